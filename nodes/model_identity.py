"""Which changes a MODEL carries, as JSON values: the same for the same experts and strengths, in every session."""

import hashlib
from collections.abc import Iterable
from typing import Any

from .native.identity import identify


def changes_of(model) -> dict[str, Any]:
    """Return what was put onto a ModelPatcher's base model.

    Weight patches are hashes of their numbers. Other changes (wrappers, hooks, replaced objects) are functions, which
    have no numbers: with them `functions` holds in this session only.
    """
    found: dict[str, Any] = {"patches": list(identify(model).patches)}
    options = model.model_options
    functions = [
        model.object_patches,
        model.forced_hooks,
        *model.wrappers.values(),
        *model.callbacks.values(),
        options.get("transformer_options", {}),
        {name: value for name, value in options.items() if name != "transformer_options"},
    ]
    if any(functions):
        text = ",".join([str(model.patches_uuid), *_ids(functions)])
        found["functions"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _ids(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, dict):
            yield from sorted(map(str, value))
            yield from _ids(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _ids(value)
        else:
            yield str(id(value))
