"""Lists of unsafe prompts alone: a line each, or a CSV such as I2P's."""

import csv
import io
from pathlib import Path

from ..errors import InputError
from .categories import canonical_categories

_CATEGORY_COLUMNS = ("categories", "category")


def read_unsafe_prompts(path: Path, category: str = "") -> list[tuple[str, tuple[str, ...]]]:
    """Return (prompt, categories) of each different prompt, in order.

    Args:
        path: `.txt`, one prompt a line, blank lines and lines that start with # left out; or `.csv` with a column
            `prompt` and, unless `category` says it, one of `categories` or `category`.
        category: of prompts that name none themselves.

    Raises:
        InputError: the file is missing, of another kind or has no such columns, or a prompt has no category.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; check the name") from None
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: cannot be read as UTF-8 text; save it as UTF-8") from None
    if path.suffix.lower() == ".csv":
        rows = _rows_of_csv(path, text)
    elif path.suffix.lower() == ".txt":
        rows = _rows_of_lines(text)
    else:
        raise InputError(f"{path}: unsafe prompts are read from .txt and .csv files; convert it to one of them")
    return _distinct(rows, category, str(path))


def parse_unsafe_prompts(text: str, category: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (prompt, categories) of each different line of a text; else as `read_unsafe_prompts`."""
    return _distinct(_rows_of_lines(text), category, "unsafe prompts")


def _distinct(rows: list[tuple[str, str]], category: str, where: str) -> list[tuple[str, tuple[str, ...]]]:
    found: dict[str, tuple[str, ...]] = {}
    for number, (prompt, named) in enumerate(rows, start=1):
        categories = canonical_categories(named or category)
        if not categories:
            raise InputError(f"{where}: prompt {number} has no category; name one for all of them")
        if prompt.strip():
            found[prompt.strip()] = tuple(dict.fromkeys(found.get(prompt.strip(), ()) + categories))
    return list(found.items())


def _rows_of_lines(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines()]
    return [(line, "") for line in lines if line and not line.startswith("#")]


def _rows_of_csv(path: Path, text: str) -> list[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or []
    if "prompt" not in columns:
        raise InputError(f"{path}: has no column `prompt`; it has {', '.join(columns) or 'none'}")
    of_category = next((name for name in _CATEGORY_COLUMNS if name in columns), "")
    try:
        return [(row["prompt"] or "", (row.get(of_category) or "") if of_category else "") for row in reader]
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not valid CSV ({error}); correct it") from None
