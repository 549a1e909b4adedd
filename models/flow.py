"""Rectified-flow models behind the Denoiser interface, which predict a velocity.

x_s = (1 - s) latents + s noise, velocity = dx/ds = noise - latents, s = 0 the image, s = 1 pure noise
(arXiv 2403.03206, eq. 2 and 13).
"""

import functools
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import SAMPLE_GUIDANCE, SAMPLE_STEPS, Conditions, FlowError, Guide, StartImage, computing_in
from .noise_schedule import NUM_TIMESTEPS


class FlowDenoiser(ABC):
    """A transformer under rectified flow. Subclasses say how it is called.

    Attributes:
        is_distilled: it draws with guidance of its own, in place of classifier-free guidance.

    Args:
        model: the diffusers transformer.
        shift: how far the levels lie on the noisy side: s = shift u / (1 + (shift - 1) u), u = (timestep + 1) / 1000.
        autocast_dtype: compute dtype, or None to compute in the weights' own.
        error: "velocity" compares velocities; "x0" the images that follow from them, noisy - s velocity, so an error
            counts s^2 times (DUO's preconditioned form, arXiv 2407.21035).
    """

    is_distilled = False

    def __init__(
        self,
        model: Any,
        shift: float,
        autocast_dtype: torch.dtype | None = None,
        error: FlowError = "velocity",
    ):
        self.model, self.shift, self.autocast_dtype, self.error = model, shift, autocast_dtype, error

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels [b] float32 of timesteps [b] in 0..999; 999 is pure noise."""
        even = (timesteps.float() + 1) / NUM_TIMESTEPS
        return self.shift * even / (1 + (self.shift - 1) * even)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def pure_noise(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents if self.error == "x0" else noise - latents

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        sigmas = self.sigmas(timesteps)
        velocity = self.velocity(noisy, sigmas, conditions)
        return noisy - sigmas.view(-1, 1, 1, 1) * velocity if self.error == "x0" else velocity

    def velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        """Return dx/ds [b, c, h, w] float32 at noise levels [b]."""
        height, width = noisy.shape[2:]
        # Patches are 2 x 2; an odd side goes on where it began, as in ComfyUI.
        even = nn.functional.pad(noisy, (0, width % 2, 0, height % 2), mode="circular")
        with computing_in(self.autocast_dtype, noisy.device):
            return self._velocity(even, sigmas, conditions).float()[..., :height, :width]

    def sample(
        self,
        noise: Tensor,
        conditions: Conditions,
        num_steps: int = SAMPLE_STEPS,
        guidance: float = SAMPLE_GUIDANCE,
        *,
        start: StartImage | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Return latents by Euler's method, as ComfyUI's `euler` and `simple` do; see `Denoiser.sample`."""
        rows = len(noise)
        num_levels = start.num_levels(num_steps) if start else num_steps
        levels = self.sigmas(torch.linspace(999, -1, num_levels + 1, device=noise.device))[-num_steps - 1 :]
        latents = noise if start is None else (1 - levels[0]) * start.latents + levels[0] * noise
        for step, (sigma, next_sigma) in enumerate(pairwise(levels)):
            empty = None
            if self.is_distilled:
                conditional = {name: value[:rows] for name, value in conditions.items()}
                velocity = self.velocity(latents, sigma.expand(rows), conditional)
            else:
                both = torch.cat([latents, latents])
                velocity, empty = self.velocity(both, sigma.expand(2 * rows), conditions).chunk(2)
            if guide:
                velocity = guide(step, velocity, functools.partial(self.velocity, latents, sigma.expand(rows)))
            if empty is not None:
                velocity = empty + guidance * (velocity - empty)
            latents = latents + (next_sigma - sigma) * velocity
        return latents

    @abstractmethod
    def _velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        """Return the model's output [b, c, h, w] for even h and w; sigmas are [b]."""
