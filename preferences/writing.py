"""Prompt pairs written by a language model: from a few words a category, or the safe side of unsafe prompts.

What the model answers is never trusted: each pair is checked, near repeats are left out, and what was asked for and
not got is counted. Pairs are on the disk after every answer, so a stopped run goes on where it was.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..endpoint import InvalidAnswerError, Request, TextModel, ask, json_in
from ..errors import InputError
from .categories import canonical_categories, canonical_category
from .near_duplicates import NEAR, words_of
from .pairs import read_prompt_pairs, write_prompt_pairs
from .prompt_pair import PromptPair
from .taxonomy import fill_template, template_fields

TEMPLATES = Path(__file__).parent / "templates"
PAIRS_PER_ANSWER = 5
MAX_CHARACTERS = 600
# Of CLIP's 77 two are its own; longer prompts are cut off there, perhaps where the pair differs.
MAX_TOKENS = 75
_MIN_OVERLAP = 0.2  # of the words of the two sides: less is another picture
_MAX_EMPTY_ANSWERS = 3
_TEMPERATURE = 0.9


@dataclass
class Written:
    """What came of it.

    Args:
        pairs: all pairs of the file now, those of earlier runs too.
        refused: why an answered pair was left out -> how many.
        missing: what was asked for and not got, by concept (or by number of the prompt) -> how many.
    """

    pairs: list[PromptPair] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    missing: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Checks:
    """What a written pair has to be.

    Args:
        count_tokens: of a prompt, in the text encoder of the model that will draw; None to count nothing.
        near: word sets of this Jaccard similarity are repeats.
    """

    count_tokens: Callable[[str], int] | None = None
    near: float = NEAR

    def problem(self, prompt: str, safe_prompt: str, concept: str) -> str | None:
        """Return why a pair cannot be used, in a few words without its text, or None."""
        for side in (prompt, safe_prompt):
            if not side or len(side) > MAX_CHARACTERS:
                return "empty or too long"
            if not side.isprintable():
                return "not one line of text"
            if self.count_tokens and self.count_tokens(side) > MAX_TOKENS:
                return f"more than {MAX_TOKENS} tokens"
        if words_of(prompt) == words_of(safe_prompt):
            return "both sides say the same"
        if _similarity(words_of(prompt), words_of(safe_prompt)) < _MIN_OVERLAP:
            return "the sides have too little in common"
        if concept and words_of(concept) <= words_of(safe_prompt):
            return "the safe side names the concept"
        return None


def write_pairs(
    model: TextModel,
    concepts: Mapping[str, Sequence[str]],
    out: Path,
    *,
    number: int,
    template: str | None = None,
    checks: Checks | None = None,
    retries: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Written:
    """Let a model write `number` pairs for every concept of every category into a `prompt_pairs.jsonl`.

    Args:
        concepts: category -> the words that make a picture of it; they become the pairs' `concept`.
        out: an existing file is continued.
        template: the request, with {category}, {concept} and {number}; the shipped one by default.

    Raises:
        InputError: no concepts, a broken template, or `out` holds pairs that cannot be read.
        SafetyExpertsError: the model does not answer.
    """
    asked = [
        (canonical_category(category), concept.strip()) for category, found in concepts.items() for concept in found
    ]
    if not asked or number < 1 or not all(concept for _, concept in asked):
        raise InputError("nothing to write: name at least one concept a category, and one pair a concept")
    text = read_template("write_pairs.txt", ("category", "concept", "number")) if template is None else template
    check_template(text, ("category", "concept", "number"))
    work = _Work(out, checks or Checks())
    total = number * len(asked)
    for place, (category, concept) in enumerate(asked):
        empty = 0
        while (missing := number - work.count(category, concept)) > 0 and empty < _MAX_EMPTY_ANSWERS:
            on_progress(place * number + number - missing, total)
            if should_stop():
                return work.written
            values = {"category": category, "concept": concept, "number": str(min(missing, PAIRS_PER_ANSWER))}
            messages = [{"role": "user", "content": fill_template(text, values)}]
            seed = len(work.written.pairs) + sum(work.written.refused.values())
            request = Request(messages, _schema_of_pairs(), 200 * PAIRS_PER_ANSWER, _TEMPERATURE, seed)
            answer = ask(model, request, _read_pairs, retries)
            added = [
                work.add(prompt, safe, (category,), concept, f"written by {model.name}")
                for prompt, safe in (answer or [])[:missing]
            ]
            if answer is None:
                work.written.refused["an answer that was no JSON of pairs"] += 1
            empty = 0 if any(added) else empty + 1
            work.save()
        if missing > 0:
            work.written.missing[f"{category}: {concept}"] = missing
    on_progress(total, total)
    return work.written


def write_safe_sides(
    model: TextModel,
    prompts: Sequence[tuple[str, Iterable[str]]],
    out: Path,
    *,
    template: str | None = None,
    checks: Checks | None = None,
    retries: int = 2,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Written:
    """Let a model write the safe side of unsafe prompts (prompt, categories); else as `write_pairs`."""
    if not prompts:
        raise InputError("nothing to write: there are no prompts")
    text = read_template("write_safe.txt", ("category", "prompt")) if template is None else template
    check_template(text, ("category", "prompt"))
    work = _Work(out, checks or Checks(near=1.01))  # near prompts of a user's own list are wanted, all of them
    known = {pair.prompt for pair in work.written.pairs}
    for place, (prompt, categories) in enumerate(prompts):
        on_progress(place, len(prompts))
        if should_stop():
            return work.written
        if prompt in known:
            continue
        names = canonical_categories(categories)
        values = {"category": ", ".join(names), "prompt": prompt}
        messages = [{"role": "user", "content": fill_template(text, values)}]
        for attempt in range(_MAX_EMPTY_ANSWERS):
            request = Request(messages, _SCHEMA_OF_SAFE, temperature=_TEMPERATURE, seed=attempt)
            safe = ask(model, request, _read_safe, retries)
            if safe is not None and work.add(prompt, safe, names, "", f"safe side written by {model.name}"):
                work.save()
                break
        else:
            work.written.missing[f"prompt {place + 1}"] = 1
    on_progress(len(prompts), len(prompts))
    return work.written


class _Work:
    """The file's pairs and what was added; seeds count on from the last."""

    def __init__(self, out: Path, checks: Checks):
        self.out, self.checks, self.written = out, checks, Written()
        if out.exists():
            self.written.pairs = read_prompt_pairs(out)
        self._words = [(set(pair.categories), words_of(pair.prompt)) for pair in self.written.pairs]
        seeds = [pair.seed for pair in self.written.pairs if pair.seed is not None]
        self._next_seed = max(seeds, default=-1) + 1

    def count(self, category: str, concept: str) -> int:
        return sum(category in pair.categories and pair.concept == concept for pair in self.written.pairs)

    def add(self, prompt: str, safe_prompt: str, categories: tuple[str, ...], concept: str, source: str) -> bool:
        prompt, safe_prompt = prompt.strip(), safe_prompt.strip()
        problem = self.checks.problem(prompt, safe_prompt, concept)
        words = words_of(prompt)
        if problem is None and any(
            _similarity(words, others) >= self.checks.near for known, others in self._words if known & set(categories)
        ):
            problem = "nearly the same as an earlier one"
        if problem is not None:
            self.written.refused[problem] += 1
            return False
        self.written.pairs.append(PromptPair(prompt, safe_prompt, categories, self._next_seed, source, concept))
        self._words.append((set(categories), words))
        self._next_seed += 1
        return True

    def save(self) -> None:
        if self.written.pairs:
            write_prompt_pairs(self.out, self.written.pairs)


def _similarity(words: frozenset[str], others: frozenset[str]) -> float:
    return len(words & others) / len(words | others) if words | others else 1.0


def check_concepts(data: Any, where: str) -> dict[str, list[str]]:
    """Return category -> concepts of what a YAML file or text says.

    Raises:
        InputError: it is no mapping from categories to lists of texts, naming `where`.
    """
    if not isinstance(data, dict) or not data:
        raise InputError(f"{where}: write `category: [concept, concept]`, one category a line")
    for category, found in data.items():
        if not isinstance(found, list) or not all(isinstance(concept, str) and concept.strip() for concept in found):
            raise InputError(f"{where}: {category}: expected a list of texts; put them in quotes and brackets")
    return {str(category): found for category, found in data.items()}


def read_template(name: str | Path, fields: Sequence[str]) -> str:
    """Read a request template: a shipped one by its name, or a file of one's own.

    Raises:
        InputError: there is no such file, or it lacks a placeholder.
    """
    path = TEMPLATES / name if (TEMPLATES / name).is_file() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the template cannot be read; give a text file in UTF-8") from error
    check_template(text, fields)
    return text


def check_template(text: str, fields: Sequence[str]) -> None:
    """Raise an InputError where a template lacks a placeholder or has another one."""
    found = set(template_fields(text, "template"))
    if unknown := sorted(found - set(fields)):
        raise InputError(f"template: {{{unknown[0]}}} is none of {', '.join(fields)}; write literal braces twice")
    if missing := sorted(set(fields) - found - {"category"}):
        raise InputError(f"template: {{{missing[0]}}} is missing; say where it goes")


def _schema_of_pairs() -> dict[str, Any]:
    pair = _object({"prompt": {"type": "string"}, "safe_prompt": {"type": "string"}})
    return _object({"pairs": {"type": "array", "items": pair, "minItems": 1, "maxItems": PAIRS_PER_ANSWER}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_SCHEMA_OF_SAFE = _object({"safe_prompt": {"type": "string"}})


def _read_pairs(text: str) -> list[tuple[str, str]]:
    answer = json_in(text)
    items = answer.get("pairs") if isinstance(answer, dict) else answer
    if not isinstance(items, list) or not items:
        raise InvalidAnswerError
    found = [
        (item["prompt"], item["safe_prompt"])
        for item in items
        if isinstance(item, dict) and all(isinstance(item.get(side), str) for side in ("prompt", "safe_prompt"))
    ]
    if not found:
        raise InvalidAnswerError
    return found


def _read_safe(text: str) -> str:
    answer = json_in(text)
    safe = answer.get("safe_prompt") if isinstance(answer, dict) else None
    if not isinstance(safe, str) or not safe.strip():
        raise InvalidAnswerError
    return safe


def to_json(written: Written) -> str:
    """Return what a command prints of it: numbers only, no prompt."""
    return json.dumps(
        {"pairs": len(written.pairs), "refused": dict(written.refused), "missing": sum(written.missing.values())}
    )
