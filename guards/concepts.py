"""What a guard is told to act against: prompts that ask for a concept, and their safe twins."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import InputError
from ..preferences.categories import canonical_category
from ..preferences.prompt_pair import PromptPair, check_text

ALLOWED = "allowed"  # in place of a category: what resembles an unsafe concept and is none


@dataclass(frozen=True)
class Concept:
    """A category, and prompts that differ in it alone: one unsafe text with its twin, or many of both.

    Many are averaged, so they should be of one kind; an empty `safe` text stands for no prompt at all.
    """

    category: str
    unsafe: tuple[str, ...] = field(repr=False)
    safe: tuple[str, ...] = field(repr=False)


def parse_concepts(text: str) -> list[Concept]:
    """Read one concept a line, `category: unsafe text | safe text`; blank lines and those with # in front are left out.

    Several lines may name one category. Without `|` the safe twin is the empty prompt. `allowed` in place of a category
    is for what resembles an unsafe concept and is none.

    Raises:
        InputError: a line has no category or no unsafe text, naming its number.
    """
    concepts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        category, colon, texts = line.partition(":")
        unsafe, _, safe = (part.strip() for part in texts.partition("|"))
        if not colon or not category.strip() or not unsafe or "|" in safe:
            raise InputError(f"line {number}: write a concept a line as `category: unsafe text | safe text`")
        if unsafe == safe:
            raise InputError(
                f"line {number}: the unsafe and the safe text are the same; let them differ in the concept"
            )
        check_text(line, f"line {number}")
        concepts.append(Concept(canonical_category(category), (unsafe,), (safe,)))
    return concepts


def concepts_of_pairs(pairs: Iterable[PromptPair], num_pairs: int) -> list[Concept]:
    """Return a concept for each category, of at most so many of its pairs, drawn at random but always the same.

    Raises:
        InputError: no pair has a category and a safe prompt.
    """
    pairs = list(pairs)
    found: dict[str, list[tuple[str, str]]] = {}
    for pair in random.Random(0).sample(pairs, len(pairs)):
        for category in pair.categories:
            texts = (pair.prompt, pair.safe_prompt)
            if pair.safe_prompt.strip() and texts not in found.setdefault(category, []):
                found[category].append(texts)
    if not any(found.values()):
        raise InputError("no prompt pair has a safe prompt and a category; give pairs with both")
    return [Concept(name, *_columns(found[name][:num_pairs])) for name in sorted(found) if found[name]]


def _columns(texts: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(unsafe for unsafe, _ in texts), tuple(safe for _, safe in texts)
