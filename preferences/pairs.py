"""Prompt pairs from files and from text: `prompt_pairs.jsonl`, CSV, taxonomies, and the lines of a node's text box."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pydantic

from ..errors import InputError
from ..files import read_text, remove_leftovers, write_atomically
from ..plain_yaml import load_yaml
from .prompt_csv import read_csv
from .prompt_pair import PromptLine, PromptPair, number_lines, parse_json_line
from .taxonomy import expand_taxonomy

__all__ = ["PromptPair", "parse_prompt_pairs", "read_prompt_pairs", "write_prompt_pairs"]

_PROMPT_LINE = pydantic.TypeAdapter(PromptLine)


def read_prompt_pairs(path: str | os.PathLike) -> list[PromptPair]:
    """Read prompt pairs from `.jsonl` (design §3), `.csv` (our columns or CoProV2's) or `.yaml` (a taxonomy).

    A repeated pair is kept once, with the categories of all its lines. Pairs without seeds are numbered from 0.

    Raises:
        InputError: the file is missing, of another kind, or wrong, naming the line or field.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": read_csv, ".yaml": _read_taxonomy, ".yml": _read_taxonomy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: prompt pairs are read from .jsonl, .csv and .yaml files; convert it to one of them")
    return reader(path)


def _read_jsonl(path: Path) -> list[PromptPair]:
    lines = []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            where = f"{path} line {number}"
            lines.append((where, parse_json_line(_PROMPT_LINE, text, where)))
    if not lines:
        raise InputError(f"{path}: holds no prompt pairs; add one JSON record a line")
    return number_lines(lines)


def _read_taxonomy(path: Path) -> list[PromptPair]:
    data = load_yaml(read_text(path), str(path))
    try:
        return expand_taxonomy(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_prompt_pairs(text: str, category: str, first_seed: int = 0) -> list[PromptPair]:
    """Read one pair a line, `unsafe prompt | safe prompt`; blank lines and lines that start with # are left out.

    Args:
        text: the lines.
        category: the category, or a comma list of categories, of them all.
        first_seed: seed of the first pair; the others count up from it.

    Raises:
        InputError: a line has not exactly one `|`, or one of its prompts is missing, naming the line number.
    """
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 2:
            raise InputError(
                f"line {number}: write one pair a line as `unsafe prompt | safe prompt`, with one | between"
            )
        lines.append((f"line {number}", PromptLine(parts[0], parts[1], tuple(category.split(",")), source="text")))
    if not lines:
        raise InputError("no prompt pairs in the text; write one a line as `unsafe prompt | safe prompt`")
    return number_lines(lines, first_seed)


def write_prompt_pairs(path: str | os.PathLike, pairs: Iterable[PromptPair]) -> None:
    """Write `prompt_pairs.jsonl`: one pair a line, with its id; nothing half-written is left behind."""
    remove_leftovers(path)
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            record = {
                "id": pair.id,
                "prompt": pair.prompt,
                "safe_prompt": pair.safe_prompt,
                "categories": pair.categories,
                "seed": pair.seed,
                "source": pair.source,
            } | ({"concept": pair.concept} if pair.concept else {})
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
