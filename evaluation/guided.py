"""Pair Guard outside ComfyUI: the same formulas on a denoiser's own predictions, for an evaluation's arms.

What its node does with denoised latents holds as it stands for predictions of noise or velocity: presence and step are
differences of predictions for the same noisy latents, and all of them change by one factor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guards.concepts import ALLOWED, Concept
from ..guards.evidence import Evidence
from ..guards.guidance import away_from_concept, distance, presence
from ..models.denoiser import Conditions

THRESHOLD, DECIDING_PART = 0.4, 1 / 3  # the node's defaults


@dataclass(frozen=True)
class GuardTexts:
    """What an arm's guard acts against: texts of one prompt each.

    Args:
        strength: k of c - k (n - s), for all concepts.
    """

    concepts: tuple[Concept, ...]
    strength: float = 1.0

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(text for concept in self.concepts for text in (concept.unsafe[0], concept.safe[0])))


class PairGuide:
    """The guide of one sampling (`Denoiser.sample`).

    Args:
        conditions_of: text -> its conditions, one row each.
    """

    def __init__(self, guard: GuardTexts, conditions_of: Callable[[str], Conditions], num_steps: int):
        self._guard, self._num_steps = guard, num_steps
        self._conditions = {text: conditions_of(text) for text in guard.texts}
        allowed = [concept.category == ALLOWED for concept in guard.concepts]
        steps_left = [float(left) for left in range(num_steps, -1, -1)]
        self._evidence = Evidence(steps_left, DECIDING_PART, THRESHOLD, allowed)
        self._all = torch.ones(1, len(allowed), dtype=torch.bool)

    def __call__(self, step: int, prompt: Tensor, predict: Callable[[Conditions], Tensor]) -> Tensor:
        """Return what takes the place of the prediction for the prompts, [b, c, h, w]."""
        left = float(self._num_steps - step)
        is_decided = self._evidence.is_decided(left)
        chosen = self._evidence.chosen(self._all) if is_decided else None
        asked = range(len(self._guard.concepts)) if chosen is None else sorted({*chosen.tolist()} - {-1})
        pairs = self._predicted(asked, len(prompt), predict)
        if chosen is None:
            nothing = torch.zeros_like(prompt)
            presences = [presence(prompt, *pair, nothing) for pair in pairs.values()]
            distances = [distance(prompt, unsafe, nothing) for unsafe, _ in pairs.values()]
            self._evidence.add(left, torch.stack(presences, dim=1), torch.stack(distances, dim=1))
            chosen = self._evidence.chosen(self._all)
        changed = prompt
        strength = torch.full([len(prompt)], self._guard.strength, device=prompt.device)
        for index, pair in pairs.items():
            is_open = (chosen == index).reshape(-1, 1, 1, 1)
            changed = torch.where(is_open, away_from_concept(prompt, *pair, strength), changed)
        return changed

    def _predicted(self, asked: Sequence[int], rows: int, predict) -> dict[int, tuple[Tensor, Tensor]]:
        found: dict[str, Tensor] = {}
        pairs = {}
        for index in asked:
            concept = self._guard.concepts[index]
            texts = concept.unsafe[0], concept.safe[0]
            for text in texts:
                if text not in found:
                    one = self._conditions[text]
                    found[text] = predict({name: value.expand(rows, *value.shape[1:]) for name, value in one.items()})
            pairs[index] = found[texts[0]], found[texts[1]]
        return pairs
