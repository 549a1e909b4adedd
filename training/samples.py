"""Pictures drawn while training: an unsafe prompt and its safe one, from the same noise, with the expert as it is."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..models.checkpoint import Checkpoint
from ..models.denoiser import conditions_on
from ..preferences.dataset import PreferencePair
from ..seeding import seeded_generator
from .cache import PairCache

if TYPE_CHECKING:
    from .run import TrainingRun


@dataclass(frozen=True)
class Samples:
    """What the expert of `step` draws (0: the base model), by prompt: the unsafe one first, then the safe one."""

    step: int
    pictures: dict[str, Image.Image]


class SampleDrawer:
    """Draws the two prompts of `pair` with the UNet in training, and decodes with the checkpoint's VAE.

    The VAE is loaded for each drawing and freed, so that training keeps the memory.
    """

    def __init__(self, checkpoint: Checkpoint, cache: PairCache, pair: PreferencePair, device: torch.device):
        self.checkpoint, self.cache, self.device = checkpoint, cache, device
        self.prompts = list(dict.fromkeys([pair.prompt, pair.safe_prompt]))
        self.shape = tuple(cache.latents(pair)[0].shape)

    @torch.no_grad()
    def draw(self, run: "TrainingRun", step: int) -> Samples:
        """Draw with the averaged weights of `run`, which afterwards is as it was."""
        conditions = self.cache.conditions([*self.prompts, *[""] * len(self.prompts)])
        conditions = conditions_on(self.device, conditions)
        noise = torch.randn(self.shape, generator=seeded_generator(run.recipe.seed, "samples"))
        noise = noise.to(self.device).expand(len(self.prompts), *self.shape)
        with run.weights(run.average):
            latents = run.policy.denoiser.sample(noise, conditions)
        vae = self.checkpoint.load_vae(device=self.device)
        return Samples(step, dict(zip(self.prompts, vae.decode_images(latents), strict=True)))
