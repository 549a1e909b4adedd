"""Lists of prompts to evaluate on, from the user's files: what they are, where they come from, what was left out."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import sha256_of_file
from ..preferences.categories import canonical_categories
from ..preferences.pairs import read_prompt_pairs
from ..preferences.prompt_pair import MAX_SEED
from .samples import Kind

# Where the published files keep what we need; the first that a file has is taken. I2P: sd_seed or evaluation_seed;
# MMA: adv_prompt; Ring-A-Bell: sensitive prompt; OVERT: prompt; COCO: caption.
_SPELLINGS = {
    "prompt": ("prompt", "unsafe_prompt", "adv_prompt", "sensitive prompt", "text", "caption"),
    "categories": ("categories", "category", "class", "label"),
    "seed": ("seed", "evaluation_seed", "sd_seed"),
    "guidance": ("guidance", "evaluation_guidance", "sd_guidance_scale"),
    "caption": ("caption", "safe_prompt", "clean_prompt"),
}
COLUMNS = tuple(_SPELLINGS)
PRESETS: dict[str, tuple[int | None, int | None]] = {"quick": (50, 100), "standard": (200, 400), "paper": (None, None)}
"""Preset -> (unsafe prompts of each category, safe prompts); None: all there are."""


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt to draw; its text stays out of the repr, so that logs and tracebacks do not quote it.

    Args:
        kind: whether it asks for unsafe content.
        seed: of its first image.
        guidance: its own classifier-free guidance, or None for the run's.
        caption: what a good image of it shows, for CLIPScore: the safe prompt of a pair, else the text itself.
    """

    text: str = field(repr=False)
    kind: Kind
    categories: tuple[str, ...]
    seed: int
    guidance: float | None = None
    caption: str = field(repr=False, default="")

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 of the text and the seed."""
        return hashlib.sha256(json.dumps([self.text, self.seed]).encode()).hexdigest()[:16]

    @property
    def sha(self) -> str:
        """Hex sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Suite:
    """Prompts of one file, and what of the file they are not.

    Args:
        id: the file's name without its ending.
        sha256: of the file.
        dropped: reason -> how many prompts of the file were left out for it.
    """

    id: str
    sha256: str
    prompts: tuple[SuitePrompt, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def categories(self) -> list[str]:
        return sorted({name for prompt in self.prompts if prompt.kind == "unsafe" for name in prompt.categories})

    def without(self, ids: Collection[str], reason: str) -> "Suite":
        """Leave prompts out and say why."""
        kept = tuple(prompt for prompt in self.prompts if prompt.id not in ids)
        number = len(self.prompts) - len(kept)
        return replace(self, prompts=kept, dropped=self.dropped | ({reason: number} if number else {}))

    def without_leaks(self, training_prompts: Collection[str]) -> "Suite":
        """Leave out what the expert was trained on, whatever its case and spaces."""
        known = {_normal(text) for text in training_prompts}
        return self.without({p.id for p in self.prompts if _normal(p.text) in known}, "in the training dataset")

    def sampled(self, unsafe_per_category: int | None, safe: int | None) -> "Suite":
        """Keep at most so many prompts, the same ones for the same file, in the file's order.

        A prompt of several categories counts in each of them.
        """
        by_chance = sorted(self.prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
        kept: set[str] = set()
        counts: dict[str, int] = {}
        for prompt in by_chance:
            limit = safe if prompt.kind == "safe" else unsafe_per_category
            groups = ("\0safe",) if prompt.kind == "safe" else (prompt.categories or ("\0none",))
            if limit is None or any(counts.get(group, 0) < limit for group in groups):
                kept.add(prompt.id)
                for group in groups:
                    counts[group] = counts.get(group, 0) + 1
        return self.without({p.id for p in self.prompts if p.id not in kept}, "not in the preset's sample")


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def read_suite(path: str | os.PathLike, kind: Kind = "unsafe", columns: Mapping[str, str] | None = None) -> Suite:
    """Read the prompts of a file.

    A `.yaml` taxonomy and files with a prompt and a safe prompt in each line give both: the unsafe ones under their
    categories and the safe ones. Others (`.csv`, `.jsonl`, `.json` as COCO's captions, `.txt`) give one `kind`.

    Args:
        kind: what prompts without a safe partner ask for.
        columns: our name (see COLUMNS) -> the file's, where the file's is none of the usual.

    Raises:
        InputError: no such file, no such column, or a wrong value, naming file and line.
    """
    path, columns = Path(path), dict(columns or {})
    if unknown := set(columns) - set(COLUMNS):
        raise InputError(f"columns: {sorted(unknown)[0]!r} is not known; choose from {', '.join(COLUMNS)}")
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a .csv, .jsonl, .json, .yaml or .txt file of prompts")
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            prompts = _of_pairs(path)
        else:
            records = list(_records(path))
            has_pairs = not columns and _has_pairs(records)
            prompts = _of_pairs(path) if has_pairs else _of_records(path, records, kind, columns)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    if not prompts:
        raise InputError(f"{path}: holds no prompts; add some")
    distinct: dict[str, SuitePrompt] = {}
    for prompt in prompts:
        if prompt.id in distinct:
            known = distinct[prompt.id]
            together = tuple(dict.fromkeys([*known.categories, *prompt.categories]))
            distinct[prompt.id] = replace(known, categories=together)
        else:
            distinct[prompt.id] = prompt
    repeated = len(prompts) - len(distinct)
    dropped = {"repeated": repeated} if repeated else {}
    return Suite(_suite_id(path.stem), sha256_of_file(path), tuple(distinct.values()), dropped)


def suite_of_pairs(name: str, pairs: Sequence[Any], sha256: str = "") -> Suite:
    """Return the suite of prompt pairs: the unsafe prompts and, with the same seeds, the safe ones."""
    prompts = [prompt for pair in pairs for prompt in _both(pair)]
    digest = sha256 or hashlib.sha256("".join(prompt.id for prompt in prompts).encode()).hexdigest()
    return Suite(_suite_id(name), digest, tuple({prompt.id: prompt for prompt in prompts}.values()))


def _suite_id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "prompts"


def _of_pairs(path: Path) -> list[SuitePrompt]:
    return [prompt for pair in read_prompt_pairs(path) for prompt in _both(pair)]


def _both(pair: Any) -> list[SuitePrompt]:
    unsafe = SuitePrompt(pair.prompt, "unsafe", pair.categories, pair.seed, None, pair.safe_prompt)
    return [unsafe, SuitePrompt(pair.safe_prompt, "safe", (), pair.seed, None, pair.safe_prompt)]


Record = tuple[str, dict[str, Any]]  # (file and line, values by lower-case name)


def _has_pairs(records: Sequence[Record]) -> bool:
    _, first = records[0] if records else ("", {})
    return "safe_prompt" in first and any(name in first for name in ("prompt", "unsafe_prompt"))


def _records(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_records(path)
    elif suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield where, _record(_json(line, where), where)
    elif suffix == ".json":
        data = _json(path.read_text(encoding="utf-8-sig"), str(path))
        items = data.get("annotations") if isinstance(data, dict) else data  # COCO's captions_val2014.json
        if not isinstance(items, list):
            raise InputError(f"{path}: needs a list of records, or COCO's `annotations`; convert it to .jsonl")
        for number, item in enumerate(items, start=1):
            yield f"{path} record {number}", _record(item, f"{path} record {number}")
    elif suffix == ".txt":
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if line.strip():
                yield f"{path} line {number}", {"prompt": line.strip()}
    else:
        raise InputError(f"{path}: prompts are read from .csv, .jsonl, .json, .yaml and .txt files; convert it")


def _csv_records(path: Path) -> Iterator[Record]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(f"{path} line {reader.line_num}: not as many values as columns; quote commas")
                yield f"{path} line {reader.line_num}", _record(row, str(path))
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV ({error}); save it as comma-separated UTF-8") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise InputError(f"{where}: not valid JSON; correct it") from None


def _record(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f'{where}: is no record of named values; write an object such as {{"prompt": …}}')
    return {str(name).strip().lower(): value for name, value in item.items()}


def _of_records(path: Path, records: Sequence[Record], kind: Kind, columns: Mapping[str, str]) -> list[SuitePrompt]:
    prompts: list[SuitePrompt] = []
    for number, (where, values) in enumerate(records):
        prompt = _value(values, "prompt", columns, where)
        if prompt is None:
            there = ", ".join(name for name in values if name) or "no columns"
            raise InputError(f"{where}: has no column {' or '.join(_SPELLINGS['prompt'][:3])}, only {there}; name it "
                             "with --column prompt=NAME")  # fmt: skip
        text = str(prompt).strip()
        if not text:
            raise InputError(f"{where}: the prompt is empty; write it, or remove the line")
        categories = _value(values, "categories", columns, where)
        names = categories if isinstance(categories, list) else str(categories or "").split(",")
        seed = _number(values, "seed", columns, where)
        guidance = _number(values, "guidance", columns, where)
        if seed is not None and not (seed == int(seed) and 0 <= seed <= MAX_SEED):
            raise InputError(f"{where}: the seed is not a whole number from 0 to {MAX_SEED}; correct it")
        if guidance is not None and not 0 <= guidance <= 100:
            raise InputError(f"{where}: the guidance is not between 0 and 100; correct it")
        caption = _value(values, "caption", columns, where)
        labels = canonical_categories([str(name) for name in names]) if kind == "unsafe" else ()
        prompts.append(
            SuitePrompt(
                text,
                kind,
                labels,
                int(seed) if seed is not None else number,
                guidance,
                str(caption).strip() if caption else text,
            )
        )
    return prompts


def _value(values: Mapping[str, Any], name: str, columns: Mapping[str, str], where: str) -> Any:
    if name in columns:
        wanted = columns[name].strip().lower()
        if wanted not in values:
            there = ", ".join(key for key in values if key)
            raise InputError(f"{where}: has no column {columns[name]!r}, only {there}; correct --column {name}=NAME")
        return values[wanted]
    return next((values[spelling] for spelling in _SPELLINGS[name] if spelling in values), None)


def _number(values: Mapping[str, Any], name: str, columns: Mapping[str, str], where: str) -> float | None:
    value = _value(values, name, columns, where)
    if value is None or not str(value).strip():
        return None
    try:
        return int(str(value)) if re.fullmatch(r"\s*\d+\s*", str(value)) else float(str(value))
    except ValueError:
        raise InputError(f"{where}: {name} is not a number; correct it, or drop the column") from None
