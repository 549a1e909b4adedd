"""Rectified-flow models behind the Denoiser interface: SD3 and FLUX.1, which predict a velocity.

x_s = (1 - s) latents + s noise, velocity = dx/ds = noise - latents, s = 0 the image, s = 1 pure noise
(arXiv 2403.03206, eq. 2 and 13).
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .denoiser import Conditions, computing_in
from .noise_schedule import NUM_TIMESTEPS

FlowError = Literal["velocity", "x0"]

# SD3: comfy/supported_models.py and SD3's scheduler config. FLUX.1-dev: exp(1.15), ComfyUI's default shift and that of
# FLUX's own schedule at 1024 px; schnell: none.
SD3_SHIFT = 3.0
FLUX_DEV_SHIFT = 3.1581929096897681
FLUX_SCHNELL_SHIFT = 1.0
# FLUX.1-dev was distilled from a model with guidance, whose scale is an input: ComfyUI's default, as used for images.
FLUX_GUIDANCE = 3.5


def shift_of(family: str, has_guidance: bool) -> float:
    """Return the shift of "sd3" or "flux" (dev, which `has_guidance`, or schnell)."""
    if family == "sd3":
        return SD3_SHIFT
    return FLUX_DEV_SHIFT if has_guidance else FLUX_SCHNELL_SHIFT


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

    @abstractmethod
    def _velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        """Return the model's output [b, c, h, w] for even h and w; sigmas are [b]."""


class SD3Denoiser(FlowDenoiser):
    """SD3 and SD3.5: a diffusers SD3Transformer2DModel."""

    def _velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        return self.model(
            noisy,
            encoder_hidden_states=conditions["hidden_states"],
            pooled_projections=conditions["pooled"],
            timestep=sigmas * 1000,
            return_dict=False,
        )[0]


class FluxDenoiser(FlowDenoiser):
    """FLUX.1 dev and schnell: a diffusers FluxTransformer2DModel, which takes the image as a sequence of patches."""

    is_distilled = True

    def _velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        batch, channels, height, width = noisy.shape
        rows, columns = height // 2, width // 2
        patches = noisy.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(rows, columns, 3, device=noisy.device)
        places[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(columns, device=noisy.device)
        context = conditions["hidden_states"]
        guidance = torch.full_like(sigmas, FLUX_GUIDANCE) if self.model.config.guidance_embeds else None
        levels = [sigmas * 1000] if guidance is None else [sigmas * 1000, guidance * 1000]
        # Unlike ComfyUI, diffusers rounds these to the compute dtype, and bfloat16 tells 896 from 900 only.
        hook = self.model.time_text_embed.register_forward_pre_hook(lambda module, args: (*levels, args[-1]))
        try:
            velocity = self.model(
                patches.reshape(batch, rows * columns, channels * 4),
                encoder_hidden_states=context,
                pooled_projections=conditions["pooled"],
                timestep=sigmas,  # the model multiplies by 1000 itself, and guidance too
                img_ids=places.view(-1, 3),
                txt_ids=torch.zeros(context.shape[1], 3, device=noisy.device),
                guidance=guidance,
                return_dict=False,
            )[0]
        finally:
            hook.remove()
        patches = velocity.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, channels, height, width)
