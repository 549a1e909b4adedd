"""Deciding, while an image is drawn, which concept is in it: from the model's own predictions of the first steps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Evidence:
    """Gathers the presence of every concept over the first steps of one sampling, then stays with what it found.

    A concept is open while the mean of its presence is above the threshold; of several, only the one with the largest
    mean acts (guarding against many at once is worse than against none: arXiv:2602.20880). Noise levels are what
    counts, not calls: some samplers look at one twice.

    Some concepts may be allowed: they never act, and where one of them is nearer to the predictions than the concept
    that would act, none does. Distance decides between two concepts, presence between a concept and its safe twin.

    Args:
        sigmas: noise levels of the sampling, in its order.
        part: how much of the steps decides, 0..1; at least one.
        threshold: θ; presence is 1/2 for the concept itself and -1/2 for its safe twin.
        allowed: of each concept, whether it is allowed; empty: none is.
    """

    def __init__(self, sigmas: list[float], part: float, threshold: float, allowed: Sequence[bool] = ()):
        num_steps = max(len(sigmas) - 1, 1)
        num_deciding = max(1, math.ceil(part * num_steps))
        self._last_sigma = sigmas[min(num_deciding, len(sigmas) - 1)] if sigmas else 0.0
        self._threshold = threshold
        self._allowed = torch.tensor(allowed, dtype=torch.bool)
        self._found: dict[float, Tensor] = {}
        self._distances: dict[float, Tensor] = {}
        self._is_decided = False

    def is_decided(self, sigma: float) -> bool:
        """Say whether the noise level lies behind the deciding steps; once it does, it does for good."""
        if self._found and sigma <= self._last_sigma:
            self._is_decided = True
        return self._is_decided

    def add(self, sigma: float, presences: Tensor, distances: Tensor | None = None) -> None:
        """Take in what was seen at a noise level, [b, concepts]; distances are of use where a concept is allowed."""
        self._found[sigma] = presences
        if distances is not None:
            self._distances[sigma] = distances

    def means(self) -> Tensor:
        """Return the mean presence so far, [b, concepts]."""
        return torch.stack([*self._found.values()]).mean(dim=0)

    def chosen(self, may_act: Tensor) -> Tensor:
        """Return the concept that is to be guarded against in each image, int [b], or -1.

        Args:
            may_act: bool [b, concepts] or [1, concepts]; the others stay closed.
        """
        means = self.means()
        means = means.masked_fill(~may_act.to(means.device), -torch.inf)
        if self._allowed.any():
            means = means.masked_fill(self._allowed.to(means.device), -torch.inf)
        best, index = means.max(dim=1)
        is_open = best > self._threshold
        if self._allowed.any():
            distances = torch.stack([*self._distances.values()]).mean(dim=0)
            nearest_allowed = distances[:, self._allowed.to(distances.device)].min(dim=1).values
            is_open &= distances.gather(1, index[:, None])[:, 0] <= nearest_allowed
        return torch.where(is_open, index, torch.full_like(index, -1))
