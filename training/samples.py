"""Pictures drawn while training: an unsafe prompt and its safe one, from the same noise, with the expert as it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..preferences.dataset import PreferencePair
from .cache import PairCache
from .checkpoint import Checkpoint
from .lora import seeded_generator

if TYPE_CHECKING:
    from .run import TrainingRun

STEPS, GUIDANCE = 20, 5.0


@dataclass(frozen=True)
class Samples:
    """What the expert of `step` draws (0: the base model), by prompt: the unsafe one first, then the safe one."""

    step: int
    pictures: dict[str, Image.Image]


class SampleDrawer:
    """Draws the two prompts of `pair` with the UNet in training, and decodes with the checkpoint's VAE.

    The VAE is loaded for each drawing and freed, so that training keeps the memory.

    Raises:
        InputError: the model is no epsilon or v model.
    """

    def __init__(self, checkpoint: Checkpoint, cache: PairCache, pair: PreferencePair, device: torch.device):
        if checkpoint.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"samples while training need an epsilon or v model, {checkpoint.name} predicts "
                f"{checkpoint.prediction_type}; train without samples"
            )
        self.checkpoint, self.cache, self.device = checkpoint, cache, device
        self.prompts = list(dict.fromkeys([pair.prompt, pair.safe_prompt]))
        self.shape = tuple(cache.latents(pair)[0].shape)

    @torch.no_grad()
    def draw(self, run: "TrainingRun", step: int) -> Samples:
        """Draw with the averaged weights of `run`, which afterwards is as it was."""
        with run.weights(run.average):
            latents = self.sample_latents(run.denoiser, run.recipe.seed)
        vae = self.checkpoint.load_vae(device=self.device)
        pixels = (vae.decode_latents(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        images = [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]
        return Samples(step, dict(zip(self.prompts, images, strict=True)))

    def sample_latents(self, denoiser, seed: int) -> torch.Tensor:
        """Return the latents of each prompt [b, c, h, w]: DPM-Solver++ (2M), 20 steps, guidance 5."""
        from diffusers import DPMSolverMultistepScheduler

        alphas = self.checkpoint.alphas_cumprod.double()
        betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
        scheduler: Any = DPMSolverMultistepScheduler(
            trained_betas=betas.numpy(), prediction_type=self.checkpoint.prediction_type
        )
        scheduler.set_timesteps(STEPS, device=self.device)
        count = len(self.prompts)
        conditions = self.cache.conditions([*self.prompts, *[""] * count])
        conditions = {name: value.to(self.device, torch.float32) for name, value in conditions.items()}
        noise = torch.randn(self.shape, generator=seeded_generator(seed, "samples"))
        latents = noise.to(self.device).expand(count, -1, -1, -1)
        for timestep in scheduler.timesteps:
            both = torch.cat([latents, latents])
            conditional, empty = denoiser.predict(both, timestep.expand(len(both)), conditions).chunk(2)
            latents = scheduler.step(empty + GUIDANCE * (conditional - empty), timestep, latents).prev_sample
        return latents
