"""What a node is given is what its sockets say: a workflow in API format may hold a value where a link belongs."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..errors import InputError

_PLAIN = (str, int, float, bool)
_OF_VALUES = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO", "*"}
_CORE_CONTAINERS = {"CONDITIONING", "LATENT"}  # which are a list and a dict; PROMPT_PAIRS is a list of our own class


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Return the node, with an `execute` that refuses in one line what is missing or did not come through a link."""
    original: Any = node.execute
    wanted = inspect.signature(original)

    @functools.wraps(original.__func__)
    def execute(cls: type[io.ComfyNode], *positional: Any, **given: Any) -> Any:
        try:
            wanted.bind(*positional, **given)
        except TypeError as error:
            raise InputError(f"an input is missing or not one of this node ({error}); add the node anew") from None
        _check(cls.define_schema().inputs, given)
        return original.__func__(cls, *positional, **given)

    node.execute = classmethod(execute)  # type: ignore[assignment, method-assign]
    return node


def _check(inputs: Sequence[Any], given: dict[str, Any]) -> None:
    for item in inputs:
        value = given.get(item.id)
        if isinstance(item, io.Autogrow.Input):
            for name, grown in _as_dict(value, item.id).items():
                _check_one(item.template.input, name, grown)
        elif isinstance(item, io.DynamicCombo.Input):
            chosen = _as_dict(value, item.id)
            for option in item.options:
                if option.key == chosen.get(item.id):
                    _check(option.inputs, chosen)
        elif value is None and item.id in given and not item.optional:
            raise InputError(f"input {item.id!r} is null; give it a value")
        else:
            _check_one(item, item.id, value)


def _as_dict(value: Any, name: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"input {name!r} is a plain value; connect it as the node shows it")
    return value or {}


def _check_one(item: Any, name: str, value: Any) -> None:
    kinds = set(item.get_io_type().split(","))
    if isinstance(item, io.WidgetInput) or value is None or kinds & _OF_VALUES:
        return
    is_cores_own = kinds & _CORE_CONTAINERS and type(value) in (list, dict)
    if type(value) in (*_PLAIN, list, dict) and not is_cores_own:
        kind = " or ".join(sorted(kinds))
        raise InputError(f"input {name!r} needs a link to {kind}, not a value; connect a node that makes one")
