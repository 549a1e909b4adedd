"""What an attack is asked for, what it found, and the lists to draw for comparison."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...files import write_atomically
from ..plan import ATTACKS_NAME
from ..suites import Suite, SuitePrompt
from .searches import Found
from .text_space import Alphabet, tokens_of

METHODS = ("swap", "published")
TEXT, DENOISER = "text", "denoiser"
# What a search goes through -> (steps, candidates a step): a candidate costs a prompt, or a prompt and predictions.
BUDGETS = {TEXT: (150, 256), DENOISER: (60, 24)}


@dataclass(frozen=True)
class AttackSettings:
    """How prompts are searched.

    Args:
        method: "swap" (gradient) or "published" (Ring-A-Bell's genetic search, of text only).
        length: free words.
        eta: how far along the concept the target lies.
        whole: search whole prompts, as published; else words behind the safe prompt.
        steps: of swap; generations of published.
        batch: swaps tried a step; the population of published.
        banned: words not to use, beside those that tell the unsafe prompt from its safe one.
        through: "text", one search for all arms, or "denoiser", a search an arm.
        bank: noises at which predictions of the denoiser are compared; a quarter of it, at least 2, screens.
    """

    method: str = "swap"
    length: int = 16
    eta: float = 3.0
    whole: bool = False
    steps: int = 150
    batch: int = 256
    banned: tuple[str, ...] = ()
    seed: int = 0
    through: str = TEXT
    bank: int = 16

    def __post_init__(self) -> None:
        if self.through not in BUDGETS:
            raise InputError(f"through {self.through!r}: choose from {', '.join(BUDGETS)}")
        if self.through == DENOISER and (self.method != "swap" or self.bank < 2):
            raise InputError("an attack through the denoiser is by swap, with a bank of 2 noises or more; correct them")
        if self.method not in METHODS:
            raise InputError(f"attack {self.method!r}: choose from {', '.join(METHODS)}")
        if self.length < 1 or self.steps < 1 or self.batch < 2:
            raise InputError("length and steps must be at least 1, batch at least 2; correct them")


@dataclass(frozen=True)
class AttackedPrompt:
    """A prompt, what was found for it, and the control of as many random words.

    Args:
        forwards: prompts through the text encoder, or predictions of the denoiser.
        arm: the one it was found on; "" for all that share the text encoder.
    """

    original: SuitePrompt
    text: str
    control: str
    losses: tuple[float, ...]
    forwards: int
    arm: str = ""


@dataclass(frozen=True)
class Start:
    """What a search for one prompt begins from: the words it may use, what stands before them, its seed."""

    alphabet: Alphabet
    prefix: tuple[int, ...]
    before: str
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, alphabet: Alphabet, prompt: SuitePrompt, settings: AttackSettings) -> "Start":
        banned = (set(words_of(prompt.text)) - set(words_of(prompt.caption))) | set(settings.banned)
        alphabet = alphabet.without(tokenizer, sorted(banned))
        prefix = () if settings.whole else tuple(tokens_of(tokenizer, prompt.caption))
        before = "" if settings.whole else f"{prompt.caption} "
        return cls(alphabet, prefix, before, random.Random(f"{settings.seed} {prompt.id}").randrange(2**31))

    def attacked(self, prompt: SuitePrompt, found: Found, length: int, arm: str = "") -> AttackedPrompt:
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = self.alphabet.tokens[torch.randint(len(self.alphabet.tokens), (length,), generator=generator)]
        control = self.before + self.alphabet.decode(drawn.tolist())
        return AttackedPrompt(prompt, self.before + found.text, control, found.losses, found.forwards, arm)


def attackable(suite: Suite) -> list[SuitePrompt]:
    """Return the unsafe prompts that have a safe partner, which says what in them is the concept.

    Raises:
        InputError: there is none.
    """
    pairs = [p for p in suite.prompts if p.kind == "unsafe" and p.caption and p.caption != p.text]
    if not pairs:
        raise InputError(f"{suite.id}: an attack learns its concept from prompt pairs; give prompts with safe_prompt")
    return pairs


def words_of(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()


def suites_of(suite: Suite, found: Sequence[AttackedPrompt], settings: AttackSettings) -> tuple[Suite, ...]:
    """Return what to draw: the prompts found, as many random words, and the originals drawn as often (seed search).

    Prompts found on several arms are a list an arm, of the prompts that every arm was attacked with.
    """
    arms = list(dict.fromkeys(attacked.arm for attacked in found))
    by_arm = {arm: {a.original.id: a for a in found if a.arm == arm} for arm in arms}
    shared = [a for a in by_arm[arms[0]].values() if all(a.original.id in others for others in by_arm.values())]

    def variant(name: str, texts: Sequence[str]) -> Suite:
        prompts = tuple(
            dataclasses.replace(attacked.original, text=text) for attacked, text in zip(shared, texts, strict=True)
        )
        return Suite(name, suite.sha256, prompts)

    return (
        *(
            variant(
                f"attack-{settings.method}" if not arm else f"attack-on-{arm}",
                [by_arm[arm][attacked.original.id].text for attacked in shared],
            )
            for arm in arms
        ),
        variant("random-words", [attacked.control for attacked in shared]),
        variant("original", [attacked.original.text for attacked in shared]),
    )


def notes_of(suites: Sequence[Suite], found: Sequence[AttackedPrompt], settings: AttackSettings) -> dict[str, Any]:
    """Return what a report says of the search; none of its words."""
    return {
        "attack_suites": [suite.id for suite in suites],
        "attack": {
            "through": settings.through,
            "method": settings.method,
            "words": settings.length,
            "steps": settings.steps,
            "candidates a step": settings.batch,
            "prompts": len(suites[0].prompts),
            "forwards a prompt": round(sum(a.forwards for a in found) / len(found)),
            "loss of start": round(sum(a.losses[-1] / a.losses[0] for a in found if a.losses) / len(found), 3),
        },
    }


class AttackLog:
    """attacks.jsonl: the only file that holds what was found, in words. A stopped search goes on from it.

    Args:
        model_sha256: of the base model.
    """

    def __init__(self, folder: Path, model_sha256: str, settings: AttackSettings):
        self.path, self._model, self._settings = folder / ATTACKS_NAME, model_sha256, settings
        self._lines: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for number, text in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    line = json.loads(text)
                    self._lines[line["key"]] = line
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{self.path} line {number}: not a found prompt; remove the file") from None

    def find(self, prompt: SuitePrompt, arm: str, made_of: Any) -> AttackedPrompt | None:
        """Return what was found for a prompt on an arm with these settings, or None."""
        line = self._lines.get(self._key(prompt, arm, made_of))
        if line is None:
            return None
        return AttackedPrompt(prompt, line["found"], line["control"], tuple(line["losses"]), line["forwards"], arm)

    def add(self, attacked: AttackedPrompt, made_of: Any) -> None:
        """Write one more.

        Raises:
            SafetyExpertsError: it cannot be written.
        """
        key = self._key(attacked.original, attacked.arm, made_of)
        self._lines[key] = {
            "key": key,
            "prompt_sha": attacked.original.sha,
            "categories": attacked.original.categories,
            "arm": attacked.arm,
            "found": attacked.text,
            "control": attacked.control,
            "losses": [float(f"{loss:.6g}") for loss in attacked.losses],
            "forwards": attacked.forwards,
            "settings": dataclasses.asdict(self._settings),
        }
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines.values())
        with write_atomically(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _key(self, prompt: SuitePrompt, arm: str, made_of: Any) -> str:
        about = [self._model, arm, made_of, prompt.id, prompt.caption, dataclasses.asdict(self._settings)]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
