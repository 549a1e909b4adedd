"""An attack on prompts: search a prompt for each that brings its concept back, and the lists to draw for comparison."""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...files import write_atomically
from ..suites import Suite, SuitePrompt
from .searches import Found, published_search, swap_search
from .text_space import Alphabet, TextSpace, concept_direction

ATTACKS_NAME = "attacks.jsonl"
METHODS = ("swap", "published")


@dataclass(frozen=True)
class AttackSettings:
    """How prompts are searched.

    Args:
        method: "swap" (gradient) or "published" (Ring-A-Bell's genetic search).
        length: free words.
        eta: how far along the concept the target lies.
        whole: search whole prompts, as published; else words behind the safe prompt.
        steps: of swap; generations of published.
        batch: swaps tried a step; the population of published.
        banned: words not to use, beside those that tell the unsafe prompt from its safe one.
    """

    method: str = "swap"
    length: int = 16
    eta: float = 3.0
    whole: bool = False
    steps: int = 150
    batch: int = 256
    banned: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"attack {self.method!r}: choose from {', '.join(METHODS)}")
        if self.length < 1 or self.steps < 1 or self.batch < 2:
            raise InputError("length and steps must be at least 1, batch at least 2; correct them")


@dataclass(frozen=True)
class AttackedPrompt:
    """A prompt, what was found for it, and the control of as many random words."""

    original: SuitePrompt
    text: str
    control: str
    losses: tuple[float, ...]
    forwards: int


def attack_prompts(
    space: TextSpace,
    suite: Suite,
    settings: AttackSettings,
    *,
    on_prompt: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[AttackedPrompt]:
    """Search for every unsafe prompt of a suite that has a safe partner; those found before a stop are returned.

    Raises:
        InputError: no prompt has a safe partner, from which the concept is learned.
    """
    pairs = [p for p in suite.prompts if p.kind == "unsafe" and p.caption and p.caption != p.text]
    if not pairs:
        raise InputError(f"{suite.id}: an attack learns its concept from prompt pairs; give prompts with safe_prompt")
    directions = {
        category: concept_direction(space, [(p.text, p.caption) for p in pairs if category in p.categories])
        for category in suite.categories
    }
    everything = concept_direction(space, [(p.text, p.caption) for p in pairs])
    alphabet = Alphabet.of(space.tower.tokenizer)
    found: list[AttackedPrompt] = []
    for number, prompt in enumerate(pairs):
        if should_stop():
            break
        direction = directions[prompt.categories[0]] if prompt.categories else everything
        found.append(_attack(space, alphabet, prompt, direction, settings, should_stop))
        on_prompt(number + 1, len(pairs))
    return found


def _attack(
    space: TextSpace,
    alphabet: Alphabet,
    prompt: SuitePrompt,
    direction: torch.Tensor,
    settings: AttackSettings,
    should_stop: Callable[[], bool],
) -> AttackedPrompt:
    banned = (set(_words(prompt.text)) - set(_words(prompt.caption))) | set(settings.banned)
    alphabet = alphabet.without(space.tower.tokenizer, sorted(banned))
    target = space.hidden_of_texts([prompt.text])[0] + settings.eta * direction
    prefix = () if settings.whole else tuple(space.tokens_of(prompt.caption))
    within = dataclasses.replace(space, prefix=prefix)
    seed = random.Random(f"{settings.seed} {prompt.id}").randrange(2**31)
    search: Callable[..., Found]
    if settings.method == "swap":
        counts: dict[str, Any] = {"steps": settings.steps, "swaps": settings.batch}
        search = swap_search
    else:
        counts = {"generations": settings.steps, "population": settings.batch}
        search = published_search
    result = search(within, alphabet, target, settings.length, seed=seed, should_stop=should_stop, **counts)
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = alphabet.tokens[torch.randint(len(alphabet.tokens), (settings.length,), generator=generator)]
    before = "" if settings.whole else f"{prompt.caption} "
    control = before + alphabet.decode(drawn.tolist())
    return AttackedPrompt(prompt, before + result.text, control, result.losses, result.forwards)


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()


def suites_of(suite: Suite, found: Sequence[AttackedPrompt], settings: AttackSettings) -> tuple[Suite, ...]:
    """Return what to draw: the prompts found, as many random words, and the originals drawn as often (seed search)."""

    def variant(name: str, texts: Sequence[str]) -> Suite:
        prompts = tuple(
            dataclasses.replace(attacked.original, text=text) for attacked, text in zip(found, texts, strict=True)
        )
        return Suite(name, suite.sha256, prompts)

    return (
        variant(f"attack-{settings.method}", [attacked.text for attacked in found]),
        variant("random-words", [attacked.control for attacked in found]),
        variant("original", [attacked.original.text for attacked in found]),
    )


def write_attacks(folder: Path, found: Sequence[AttackedPrompt], settings: AttackSettings) -> Path:
    """Write attacks.jsonl: the only file that holds what was found, in words.

    Raises:
        SafetyExpertsError: it cannot be written.
    """
    path = folder / ATTACKS_NAME
    lines = [
        json.dumps(
            {
                "prompt_sha": attacked.original.sha,
                "categories": attacked.original.categories,
                "found": attacked.text,
                "control": attacked.control,
                "loss_first": attacked.losses[0] if attacked.losses else None,
                "loss_last": attacked.losses[-1] if attacked.losses else None,
                "forwards": attacked.forwards,
                "settings": dataclasses.asdict(settings),
            },
            ensure_ascii=False,
        )
        for attacked in found
    ]
    with write_atomically(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
