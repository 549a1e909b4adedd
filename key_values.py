"""`key=value` texts, as `--set` and the nodes' text boxes take them."""

from collections.abc import Iterable

from .errors import InputError


def parse_key_values(texts: Iterable[str]) -> dict[str, str]:
    """Return key -> value, both stripped; of a key given twice the last.

    Raises:
        InputError: a text has no key or no `=`.
    """
    values = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise InputError(f"{text!r} is not of the form key=value")
        values[key.strip()] = value.strip()
    return values
