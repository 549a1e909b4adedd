"""How a guard changes the prediction for a prompt, from predictions for an unsafe concept and for its safe twin.

All predictions are denoised latents (x0) [b, …] of the same noisy latents x at noise level σ [b]: c of the prompt, u
of the empty prompt, n of an unsafe concept, s of its safe twin. A guard returns c', and classifier-free guidance with
c' in the place of c is guidance away from the concept, whatever the guidance formula and the sampler; so none of them
needs u unless its own formula does. Noise predictions are e = (x - x0) / σ; for flow models this is the velocity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this share of the noise prediction, the difference of unsafe and safe twin is rounding and says nothing.
SMALLEST_DIFFERENCE = 0.002


@dataclass(frozen=True)
class SldPreset:
    """The hyperparameters of Safe Latent Diffusion (Schramowski et al., arXiv:2211.05105).

    Attributes:
        warmup: part of the steps without guidance; published as a number of 50 steps.
        scale, threshold: s_S and λ, in units of the noise prediction.
        momentum, decay: s_m and β_m.
    """

    warmup: float
    scale: float
    threshold: float
    momentum: float
    decay: float


# Of the paper and diffusers 0.33 (`pipelines/stable_diffusion_safe`); tuned on SD1.4 with 50 steps and a CFG of 7.5.
SLD_PRESETS = {
    "weak": SldPreset(15 / 50, 20.0, 0.0, 0.0, 0.0),
    "medium": SldPreset(10 / 50, 1000.0, 0.01, 0.3, 0.4),
    "strong": SldPreset(7 / 50, 2000.0, 0.025, 0.5, 0.7),
    "max": SldPreset(0.0, 5000.0, 1.0, 0.5, 0.7),
}


def presence(prompt: Tensor, unsafe: Tensor, safe: Tensor, noisy: Tensor) -> Tensor:
    """Return how much of a concept is in the prediction for the prompt, [b]: 1/2 where c = n, -1/2 where c = s.

    p = ⟨c - (n + s)/2, n - s⟩ / |n - s|²: where the prediction lies on the way from the safe twin to the unsafe
    concept. It is the evidence of concept removal guidance (arXiv:2606.29801) with the twin as the other hypothesis.
    """
    difference = unsafe - safe
    floor = SMALLEST_DIFFERENCE**2 * _dot(prompt - noisy, prompt - noisy)
    length = torch.maximum(_dot(difference, difference), floor).clamp(min=torch.finfo(torch.float32).tiny)
    return _dot(prompt - (unsafe + safe) / 2, difference) / length


def distance(prompt: Tensor, unsafe: Tensor, noisy: Tensor) -> Tensor:
    """Return |c - n|² / |c - x|², [b]: the smallest is the most likely of several concepts."""
    length = _dot(prompt - noisy, prompt - noisy).clamp(min=torch.finfo(torch.float32).tiny)
    return _dot(prompt - unsafe, prompt - unsafe) / length


def away_from_concept(prompt: Tensor, unsafe: Tensor, safe: Tensor, strength: Tensor) -> Tensor:
    """Return c - k (n - s) with a strength k of each image, [b]."""
    return prompt - _spread(strength, prompt) * (unsafe - safe)


def sld_gradient(prompt: Tensor, unsafe: Tensor, empty: Tensor, sigma: Tensor, preset: SldPreset) -> Tensor:
    """Return the safety guidance without momentum, in units of the noise prediction.

    Where e_c - e_n < λ it is min(1, s_S |e_c - e_n|) (e_n - e_u), elsewhere zero. The thresholds are of noise
    predictions, so differences of denoised latents are divided by σ first (and have the opposite sign).
    """
    prompt_to_unsafe = (unsafe - prompt) / _spread(sigma, prompt)  # e_c - e_n
    size = (preset.scale * prompt_to_unsafe.abs()).clamp(max=1.0)
    size = torch.where(prompt_to_unsafe >= preset.threshold, torch.zeros_like(size), size)
    return size * (empty - unsafe) / _spread(sigma, prompt)


class SldMomentum:
    """The momentum of one sampling, gathered from its first step on, also during the warm-up.

    Samplers that look at a noise level twice count it once.
    """

    def __init__(self, preset: SldPreset):
        self._preset = preset
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        self._sigma: float | None = None

    def add(self, gradient: Tensor, sigma: float) -> Tensor:
        """Return g = gradient + s_m v, and keep v ← β v + (1 - β) g for the next noise level."""
        if sigma != self._sigma:
            self._before, self._sigma = self._after, sigma
        velocity = torch.zeros_like(gradient) if self._before is None else self._before
        gradient = gradient + self._preset.momentum * velocity
        self._after = self._preset.decay * velocity + (1 - self._preset.decay) * gradient
        return gradient


def away_from_gradient(prompt: Tensor, gradient: Tensor, sigma: Tensor, strength: Tensor) -> Tensor:
    """Return c' with e_c' = e_c - k g, which is c + σ k g."""
    return prompt + _spread(strength * sigma, prompt) * gradient


def nearest_concept(prompt: Tensor, unsafe: Tensor, empty: Tensor) -> Tensor:
    """Return which of several concepts [k, b, …] the prompt leans to most, int [b].

    argmax ⟨n_k - u, c - u⟩ / |n_k - u|, the choice of category-aware safety guidance (arXiv:2602.20880): the cosine,
    as |c - u| is the same for all.
    """
    scores = []
    for concept in unsafe:
        direction = concept - empty
        length = _dot(direction, direction).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        scores.append(_dot(direction, prompt - empty) / length)
    return torch.stack(scores).argmax(dim=0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() * b.float()).flatten(1).sum(dim=1)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Return values [b] with as many dimensions as `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
