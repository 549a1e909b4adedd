"""Prompt pairs from CSV: our own columns, and CoProV2's `prompt,image,category`."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError
from ..files import read_text
from .prompt_pair import PromptLine, PromptPair, number_lines

# Our field -> the columns it may stand in.
_COLUMNS = {
    "prompt": ("prompt", "unsafe_prompt"),
    "safe_prompt": ("safe_prompt",),
    "categories": ("category", "categories"),
    "seed": ("seed",),
    "source": ("source",),
    "concept": ("concept",),
}


@dataclass(frozen=True)
class CoProV2Pair:
    """A pair of a CoProV2 CSV and the two image files it names.

    Args:
        pair: to draw anew its seed counts pairs; with the images it is None, as the file does not say it.
        where: file and line.
        our_fields: what an export of ours keeps in a column of its own.
    """

    pair: PromptPair
    safe_image: str
    unsafe_image: str
    where: str
    our_fields: str = ""


def read_csv(path: Path) -> list[PromptPair]:
    """Read the prompt pairs of a CSV file of either layout.

    Ours: columns `prompt` (or `unsafe_prompt`), `safe_prompt`, `category` (or `categories`, a comma list) and, if
    given, `seed`, `source` and `concept`; other columns are ignored.

    Raises:
        InputError: a column is missing or a row is wrong, naming the line.
    """
    header, rows = _read_table(path)
    if _is_coprov2(header):
        return [found.pair for found in read_coprov2(path)]
    columns: dict[str, str] = {}
    for name, spellings in _COLUMNS.items():
        present = [spelling for spelling in spellings if spelling in header]
        if len(present) > 1 or (not present and name not in ("seed", "source", "concept")):
            wanted = " or ".join(spellings)
            raise InputError(
                f"{path} line 1: needs one column {wanted}, it has {len(present)}; write the names of the columns there"
            )
        if present:
            columns[name] = present[0]
    return number_lines((where, _read_row(row, columns, where, path.name)) for where, row in rows)


def _read_row(row: dict[str, str], columns: dict[str, str], where: str, file_name: str) -> PromptLine:
    seed = None
    if "seed" in columns:
        text = row[columns["seed"]].strip()
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise InputError(
                f"{where}: seed is not a whole number of at most 19 digits; correct it, or drop the column"
            )
        seed = int(text)
    return PromptLine(
        prompt=row[columns["prompt"]].strip(),
        safe_prompt=row[columns["safe_prompt"]].strip(),
        categories=tuple(row[columns["categories"]].split(",")),
        seed=seed,
        source=row[columns["source"]].strip() if "source" in columns else file_name,
        concept=row[columns["concept"]].strip() if "concept" in columns else "",
    )


def read_coprov2(path: Path, *, with_images: bool = False) -> list[CoProV2Pair]:
    """Pair the rows of a CoProV2 CSV by the part of the file name after `u_` (unsafe) or `s_` (safe).

    A pair in several categories stands in the file once for each; it becomes one pair with all of them.

    Args:
        with_images: the images exist, so a prompt may have several pairs, and a seed or a safe prompt is not needed.

    Raises:
        InputError: a file name has no `u_` or `s_` (CoProV2's test split: unsafe prompts only), a pair lacks one side,
            or one image is given two prompts.
    """
    header, rows = _read_table(path)
    if not _is_coprov2(header):
        raise InputError(
            f"{path}: is not in CoProV2's layout (columns prompt, image, category); import it without images"
        )
    sides: dict[str, dict[str, tuple[str, str]]] = {}
    categories: dict[str, tuple[str, ...]] = {}
    first_lines: dict[str, str] = {}
    our_fields: dict[str, str] = {}
    for where, row in rows:
        image = row["image"].strip()
        side, _, key = PurePosixPath(image).name.partition("_")
        if side not in ("u", "s") or not key:
            raise InputError(
                f"{where}: column image does not start with u_ or s_, so it has no partner; "
                "give the file with both sides, or a CSV with a safe_prompt column"
            )
        entry = (row["prompt"].strip(), image)
        first_lines.setdefault(key, where)
        our_fields.setdefault(key, row.get("safety_experts", ""))
        if sides.setdefault(key, {}).setdefault(side, entry) != entry:
            raise InputError(f"{where}: its image stood above with another prompt or folder; keep one of the two")
        categories[key] = categories.get(key, ()) + tuple(row["category"].split(","))
    pairs = []
    for index, (key, found) in enumerate(sides.items()):
        if len(found) < 2:
            present, missing = ("u", "s") if "u" in found else ("s", "u")
            raise InputError(
                f"{first_lines[key]}: this {present}_ image has no partner; add the row of its {missing}_ image"
            )
        (prompt, unsafe_image), (safe_prompt, safe_image) = found["u"], found["s"]
        where, source = first_lines[key], f"{path.name}:{key}"
        if with_images:
            try:
                pair = PromptPair(prompt, safe_prompt, categories[key], None, source)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        else:
            line = PromptLine(prompt, safe_prompt, categories[key], index, source)
            pair = number_lines([(where, line)])[0]
        pairs.append(CoProV2Pair(pair, safe_image, unsafe_image, where, our_fields[key]))
    return pairs


def _is_coprov2(header: list[str]) -> bool:
    return {"prompt", "image", "category"} <= set(header) and "safe_prompt" not in header


def _read_table(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Return the lower-case column names and, for every row, (where, values by column)."""
    rows: list[tuple[str, dict[str, str]]] = []
    text = read_text(path)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        for values in reader:
            where = f"{path} line {reader.line_num}"
            if values and len(values) != len(header):
                raise InputError(f"{where}: {len(values)} values for {len(header)} columns; quote texts with commas")
            if values:
                rows.append((where, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV ({error}); save it as comma-separated UTF-8") from None
    if len(set(header)) != len(header):
        raise InputError(f"{path}: two columns have the same name; rename one")
    if not rows:
        raise InputError(f"{path}: has no rows of prompt pairs; add some under a header line")
    return header, rows
