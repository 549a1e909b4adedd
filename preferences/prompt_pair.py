"""A prompt pair: an unsafe prompt, the safe prompt close to it in meaning, and the seed both images are drawn with."""

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

import pydantic
import pydantic_core

from ..errors import InputError
from .categories import canonical_categories

MAX_SEED = 2**63 - 1  # HF datasets (Arrow) reads whole numbers as signed 64 bit

Record = TypeVar("Record")


@dataclass(frozen=True)
class PromptPair:
    """One prompt pair; its prompts stay out of the repr, so that logs and tracebacks do not quote them.

    `categories` may be any spelling; they are stored canonical. `source` says where the pair came from,
    `concept` the words that make the prompt unsafe. A pair to draw has a seed; that of images found elsewhere may be
    unknown (None).

    Raises:
        InputError: an empty prompt, text that is not valid Unicode, or a seed outside 0 … 2^63 - 1.
    """

    prompt: str = field(repr=False)
    safe_prompt: str = field(repr=False)
    categories: tuple[str, ...]
    seed: int | None
    source: str = ""
    concept: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", canonical_categories(self.categories))
        check_prompt(self.prompt)
        for name in ("prompt", "safe_prompt", "concept", "source"):
            check_text(getattr(self, name), name)
        check_seed(self.seed)

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 of prompt, safe prompt and seed: what decides the two images, labels aside."""
        content = json.dumps([self.prompt, self.safe_prompt, self.seed])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PromptLine:
    """A prompt pair as a file gives it: perhaps without a seed; an `id` is ignored, as ids come from the content."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    prompt: str
    safe_prompt: str
    categories: tuple[str, ...]
    seed: int | None = None
    source: str = ""
    concept: str = ""
    id: object = None


def check_prompt(prompt: str) -> None:
    """Raise an InputError where the prompt both images are trained under is empty."""
    if not prompt.strip():
        raise InputError("prompt is empty; write the prompt both images are trained under")


def check_text(text: str, name: str) -> None:
    """Raise an InputError where `text` cannot be written as UTF-8 (a lone surrogate from a broken file)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not valid Unicode; save the file as UTF-8") from None


def check_seed(seed: int | None) -> None:
    """Raise an InputError where `seed` is neither None (unknown) nor a whole number in 0 … 2^63 - 1."""
    if seed is None:
        return
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is not a whole number from 0 to {MAX_SEED}; choose another seed")


def number_lines(lines: Iterable[tuple[str, PromptLine]], first_seed: int = 0) -> list[PromptPair]:
    """Turn file lines into pairs: without seeds they are numbered `first_seed`, `first_seed` + 1, …

    Repeats become one pair with the categories of all of them; the order is that of the first of each.

    Args:
        lines: (where, line) with `where` naming file and line for the error.

    Raises:
        InputError: a line lacks a safe prompt, differs in nothing from its safe prompt or has no category, or only some
            lines have a seed.
    """
    pairs: dict[tuple[str, str, int | None], PromptPair] = {}
    seeded: bool | None = None
    for where, line in lines:
        if seeded is None:
            seeded = line.seed is not None
        try:
            if not line.safe_prompt.strip():
                raise InputError("safe_prompt is empty; write the safe prompt of this pair")
            if line.prompt.strip() == line.safe_prompt.strip():
                raise InputError("safe_prompt equals prompt; the two must differ")
            if (line.seed is not None) != seeded:
                raise InputError("seed: some lines have one and some do not; give every line a seed, or none")
            key = (line.prompt, line.safe_prompt, line.seed)
            seed = line.seed if line.seed is not None else first_seed + len(pairs)
            pair = PromptPair(line.prompt, line.safe_prompt, line.categories, seed, line.source, line.concept)
            if not pair.categories:
                raise InputError("category is empty; name at least one")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        known = pairs.setdefault(key, pair)
        pairs[key] = replace(known, categories=known.categories + pair.categories)
    return list(pairs.values())


def parse_json_line(adapter: pydantic.TypeAdapter[Record], text: str | bytes, where: str) -> Record:
    """Read one JSON record into its dataclass.

    Raises:
        InputError: the first thing wrong with it, naming `where` and the field, without quoting the text.
    """
    try:
        return adapter.validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = _name_of_field(first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise InputError(f"{where}: {_unknown_field(str(first['loc'][-1]), text, adapter)}") from None
        if first["type"] == "missing":
            raise InputError(f"{where}: field {name!r} is missing; add it") from None
        problem = f"field {name!r}: {first['msg']}" if name else first["msg"]
        raise InputError(f"{where}: {problem}; correct the line") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _name_of_field(location: tuple[int | str, ...]) -> str:
    # Only our own name: what stands under it (a judge, say) is the user's text.
    return str(location[0]) if location else ""


def _unknown_field(name: str, text: str | bytes, adapter: pydantic.TypeAdapter) -> str:
    # Its place, not its name: who writes a prompt in the wrong place does not want it in a log.
    if close := difflib.get_close_matches(name, adapter.json_schema()["properties"], 1, 0.75):
        return f"unknown field, much like {close[0]!r}; correct its name"
    record = pydantic_core.from_json(text)
    place = f" (number {[*record].index(name) + 1} of the record)" if name in record else ""
    return f"unknown field{place}; remove it, or update Safety Experts"
