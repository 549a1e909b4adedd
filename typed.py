"""Files people share are checked by a typed model at the door: JSON of bounded depth, texts that are safe to print."""

import json
import unicodedata
from typing import Annotated, Any, TypeVar

import pydantic

from .errors import InputError

_MAX_TEXT = 10_000
_MAX_MESSAGE = 300
_UNPRINTABLE = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}  # control characters, lone surrogates, line separators

Record = TypeVar("Record", bound=pydantic.BaseModel)


def _checked_text(text: str) -> str:
    if len(text) > _MAX_TEXT:
        raise ValueError(f"is longer than {_MAX_TEXT} characters")
    if any(unicodedata.category(letter) in _UNPRINTABLE for letter in text):
        raise ValueError("holds control characters")
    return text


# One line of text, safe on a terminal and in a log.
Text = Annotated[str, pydantic.AfterValidator(_checked_text)]


class FileRecord(pydantic.BaseModel):
    """What a file says: fixed once read, no field that is not known, every number finite."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def printable(text: str, length: int = _MAX_MESSAGE) -> str:
    """Return foreign text as one line that does nothing to a terminal or a log, cut to a length."""
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in _UNPRINTABLE else c for c in text[:length]
    )
    return shown if len(text) <= length else f"{shown}…"


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        InputError: it is no JSON, or too deep; `where` is named, the text is not quoted.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (RecursionError, ValueError):  # nested thousands deep; a whole number of thousands of digits
        problem = "nested too deep, or a number is too long"
    raise InputError(f"{where} is damaged ({problem}); use another copy")


def _field_names(model: type[pydantic.BaseModel]) -> set[str]:
    """Return the names of all fields of all models made from this one: other keys are the file's own words."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.default, str):
            names.add(field.default)  # the kind of an origin, which stands in a place's name
    return names.union(*map(_field_names, model.__subclasses__()))


def read_record(model: type[Record], values: object, where: str) -> Record:
    """Return values from a file as their model.

    Raises:
        InputError: the first thing wrong with them, naming `where` and the field; the value is not quoted.
    """
    try:
        return model.model_validate(values)
    except RecursionError:
        raise InputError(f"{where} is damaged (nested too deep); use another copy") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        own = _field_names(FileRecord)
        name = ".".join(str(part) if isinstance(part, int) or part in own else "…" for part in first["loc"][:8])
        if first["type"] == "extra_forbidden":
            raise InputError(f"{where}: field {name!r} is not known; update the pack, or use another copy") from None
        if first["type"] == "missing":
            raise InputError(f"{where}: field {name!r} is missing; use another copy") from None
        # This one quotes the value.
        problem = "a kind that is not known" if first["type"] == "union_tag_invalid" else printable(first["msg"], 150)
        raise InputError(f"{where} is damaged (field {name!r}: {problem}); use another copy") from None
