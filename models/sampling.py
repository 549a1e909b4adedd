"""Drawing with a denoiser outside ComfyUI: few steps, classifier-free guidance, the family's usual solver."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoint import Checkpoint
from .denoiser import Conditions, Denoiser
from .flow import FlowDenoiser
from .vae import Vae

STEPS, GUIDANCE = 20, 5.0


def sample_latents(
    denoiser: Denoiser,
    checkpoint: Checkpoint,
    noise: Tensor,
    conditions: Conditions,
    num_steps: int,
    guidance: float,
    use_karras_sigmas: bool = False,
) -> Tensor:
    """Return latents [b, c, h, w] by DPM-Solver++ (2M) with classifier-free guidance.

    Args:
        noise: [b, c, h, w], standard normal.
        conditions: 2b rows: those of the prompts, then those of the empty prompt.
    """
    from diffusers import DPMSolverMultistepScheduler

    alphas = checkpoint.alphas_cumprod.double()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    scheduler: Any = DPMSolverMultistepScheduler(
        trained_betas=betas.numpy(), prediction_type=checkpoint.prediction_type, use_karras_sigmas=use_karras_sigmas
    )
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents])
        conditional, empty = denoiser.predict(both, timestep.expand(len(both)), conditions).chunk(2)
        latents = scheduler.step(empty + guidance * (conditional - empty), timestep, latents).prev_sample
    return latents


def sample_flow_latents(denoiser: FlowDenoiser, noise: Tensor, conditions: Conditions, num_steps: int) -> Tensor:
    """Return latents [b, c, h, w] by Euler's method, as ComfyUI's `euler` and `simple` do.

    Args:
        noise, conditions: as `sample_latents` takes them.
    """
    rows = len(noise)
    levels = denoiser.sigmas(torch.linspace(999, -1, num_steps + 1, device=noise.device))
    latents = noise
    for sigma, next_sigma in pairwise(levels):
        if denoiser.is_distilled:
            conditional = {name: value[:rows] for name, value in conditions.items()}
            velocity = denoiser.velocity(latents, sigma.expand(rows), conditional)
        else:
            both = torch.cat([latents, latents])
            velocity, empty = denoiser.velocity(both, sigma.expand(2 * rows), conditions).chunk(2)
            velocity = empty + GUIDANCE * (velocity - empty)
        latents = latents + (next_sigma - sigma) * velocity
    return latents


def decode_images(vae: Vae, latents: Tensor) -> list[Image.Image]:
    """Return one RGB image for each of the latents [b, c, h, w]."""
    pixels = (vae.decode_latents(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]
