"""Which changes a MODEL carries, as a hash: the same for the same experts and strengths, in every session."""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..experts.expert import tensor_bytes


def changes_sha256(model) -> str:
    """Return a hash of what was patched onto a ModelPatcher's base model.

    Weight patches count by their numbers. Other changes (wrappers, hooks, replaced objects) are functions, which have
    no numbers: with them the hash holds in this session only.
    """
    digest = hashlib.sha256()
    for key in sorted(model.patches):
        digest.update(repr(key).encode())
        _add(digest, model.patches[key])
    functions = [model.object_patches, model.forced_hooks, *model.wrappers.values(), *model.callbacks.values()]
    options = model.model_options
    more = [options.get("transformer_options", {}), {k: v for k, v in options.items() if k != "transformer_options"}]
    if any(functions) or any(more):
        digest.update(str(model.patches_uuid).encode())
        digest.update(",".join(_ids([*functions, *more])).encode())
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, (list, tuple)):
        digest.update(b"(")
        for part in value:
            _add(digest, part)
        digest.update(b")")
    elif value is None or isinstance(value, (str, int, float, bool)):
        digest.update(repr(value).encode())
    else:  # a weight adapter: its class and its tensors
        digest.update(type(value).__qualname__.encode())
        _add(digest, getattr(value, "weights", None))


def _ids(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, dict):
            yield from sorted(map(str, value))
            yield from _ids(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _ids(value)
        else:
            yield str(id(value))
