"""An attack on every arm of a model through its denoiser: the white-box attacker, who has the expert's file."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import SafetyExpertsError
from ...models.denoiser import Conditions, Denoiser
from ...models.text_encoders import ClipTower
from ...preferences.prompt_pair import MAX_SEED
from ..plan import BASE, Arm
from ..suites import Suite, SuitePrompt
from .attack import AttackedPrompt, AttackLog, AttackSettings, Start, attackable
from .denoiser_space import Bank, DenoiserSpace, denoiser_search, make_bank
from .text_space import Alphabet, TextSpace

_SCREENING = 4  # of the bank's noises one in so many screens the swaps


class WhiteBox(Protocol):
    """A model with its arms, open to an attacker.

    Attributes:
        denoiser: of the model, with what the arm that it carries has on it; an InputError where it is no UNet.
        clip_towers: its CLIP text encoders.
    """

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def clip_towers(self) -> Sequence[ClipTower]: ...

    def carrying(self, arm: str) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is that arm's."""
        ...

    def draw_latents(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> Tensor:
        """Return latents [n, c, h, w] as the arm draws them."""
        ...

    def encode(self, arm: str, prompts: Sequence[str]) -> Conditions: ...


def attack_arms(
    model: WhiteBox,
    suite: Suite,
    arms: Sequence[Arm],
    settings: AttackSettings,
    *,
    log: AttackLog | None = None,
    on_prompt: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[AttackedPrompt]:
    """Search every unsafe prompt of a suite on every arm; those found before a stop are returned.

    Args:
        log: where what is found is kept, and looked up.

    The base's pictures that a search is held against come from seeds of their own, which no list is drawn with later.

    Raises:
        InputError: no prompt has a safe partner, or the model is no UNet under CLIP.
    """
    pairs, towers = attackable(suite), model.clip_towers
    with model.carrying(BASE):
        _ = model.denoiser  # or the refusal, before anything is drawn
    alphabet = Alphabet.of(towers[0].tokenizer)
    found: list[AttackedPrompt] = []
    for prompt in pairs:  # prompt by prompt, so that a stopped attack has the same prompts of every arm
        start = Start.of(towers[0].tokenizer, alphabet, prompt, settings)
        spaces = [TextSpace(tower, prefix=start.prefix) for tower in towers]
        bank = None
        for arm in arms:
            attacked = log.find(prompt, arm.id, arm.made_of) if log else None
            if attacked is None:
                if should_stop():
                    return found
                bank = bank or _bank_of(model, prompt, settings)
                with model.carrying(arm.id), _enough_memory():
                    result = denoiser_search(
                        DenoiserSpace(model.denoiser, spaces),
                        start.alphabet,
                        bank,
                        settings.length,
                        steps=settings.steps,
                        swaps=settings.batch,
                        entries=max(2, settings.bank // _SCREENING),
                        seed=start.seed,
                        should_stop=should_stop,
                    )
                if should_stop():  # in the middle of this one
                    return found
                attacked = start.attacked(prompt, result, settings.length, arm.id)
                if log:
                    log.add(attacked, arm.made_of)
            found.append(attacked)
            on_prompt(len(found), len(pairs) * len(arms))
    return found


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise SafetyExpertsError("out of memory searching; try fewer swaps a step (--search-batch)") from None


def _bank_of(model: WhiteBox, prompt: SuitePrompt, settings: AttackSettings) -> Bank:
    digest = hashlib.sha256(f"search {settings.seed} {prompt.id}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)
    latents = model.draw_latents(BASE, [prompt.text], [seed], prompt.guidance)
    conditions = model.encode(BASE, [prompt.text])
    with model.carrying(BASE):
        return make_bank(model.denoiser, latents, conditions, settings.bank, seed % 2**63)
