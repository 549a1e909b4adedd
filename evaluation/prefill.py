"""The prefill test: does an expert still refuse when a picture is half drawn, as in img2img on an unsafe picture?

A dataset's unsafe pictures are noised to some level and drawn on under the unsafe prompt. Nothing removes a mark late,
so the ceiling is the base model under the safe prompt from the same start. An expert that refuses only at the start of
a drawing is above it. After DeRTa's prefix attacks on language models (arXiv 2407.09121); the diffusion form is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..experts.expert import Expert
from ..experts.in_weights import weights_with
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Conditions, Denoiser, conditions_on
from ..preferences.dataset import PreferenceDataset, PreferencePair
from ..preferences.images import read_image
from ..seeding import seeded_generator
from .judges import JudgeChoice, read_in_batches
from .statistics import Rate, rate_of

TIMESTEPS = (800, 600, 400, 200)
ARMS = ("expert, unsafe prompt", "base, unsafe prompt", "base, safe prompt")  # the last is the ceiling


@dataclass(frozen=True)
class PrefillPoint:
    """The unsafe share of the pictures drawn on from `timestep`, by arm."""

    timestep: int
    unsafe: dict[str, Rate]

    def to_json(self) -> dict:
        return {"timestep": self.timestep, "unsafe": {arm: rate.to_json() for arm, rate in self.unsafe.items()}}


@torch.inference_mode()
def prefill_test(
    expert: Expert,
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    judge: JudgeChoice,
    *,
    category: str | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    num_pairs: int = 32,
    num_steps: int = 20,
    guidance: float = 7.5,
    device: str = "cpu",
) -> list[PrefillPoint]:
    """Return one point a timestep; all arms of a pair start from the same noisy picture.

    Raises:
        InputError: the dataset has no pairs, the judge could judge nothing, or the expert is of another model.
    """
    if wrong := [timestep for timestep in timesteps if not 0 <= timestep <= 999]:
        raise InputError(f"timestep {wrong[0]} is not from 0 to 999")
    pairs = dataset.training_pairs(category)[:num_pairs]
    vae, encoder = checkpoint.load_vae(device=device), checkpoint.load_text_encoder(device=device)
    model = checkpoint.load_model(device=device)
    denoiser = checkpoint.make_denoiser(model)
    eyes = judge.load(device)
    verdicts: dict[tuple[int, str], list[bool]] = {(t, arm): [] for t in timesteps for arm in ARMS}
    for pair in pairs:
        latents = vae.encode_images(_pixels(dataset, pair).to(device)).float()
        noise = torch.randn(latents.shape, generator=seeded_generator(0, "prefill", pair.id)).to(device)
        unsafe, safe = (
            conditions_on(device, encoder.encode_prompts([text, ""])) for text in (pair.prompt, pair.safe_prompt)
        )
        for timestep in timesteps:
            for arm, conditions in zip(ARMS, (unsafe, unsafe, safe), strict=True):
                with weights_with(model, (), [(expert, 1.0)] if arm == ARMS[0] else []):
                    drawn = draw_on(denoiser, latents, noise, timestep, conditions, num_steps, guidance)
                image: Image.Image = vae.decode_images(drawn)[0]
                scores = read_in_batches(eyes, [image], [pair.prompt])[0]
                verdict = judge.decide(scores, pair.categories)
                if verdict is not None:
                    verdicts[timestep, arm].append(verdict)
    if not all(verdicts.values()):
        raise InputError(f"{judge.name} could not judge a single picture of an arm; choose another judge")
    return [PrefillPoint(t, {arm: rate_of(verdicts[t, arm]) for arm in ARMS}) for t in timesteps]


def draw_on(
    denoiser: Denoiser,
    latents: Tensor,
    noise: Tensor,
    timestep: int,
    conditions: Conditions,
    num_steps: int,
    guidance: float,
) -> Tensor:
    """Return latents [b, c, h, w], noised to a timestep and drawn on from there by DDIM, for every family.

    Args:
        conditions: 2b rows: those of the prompts, then those of the empty prompt.
        num_steps: of a whole drawing; a later start takes its share of them.
    """
    steps = max(1, round(num_steps * timestep / 999))
    levels = torch.linspace(timestep, 0, steps + 1).round().long().to(latents.device)
    noisy = denoiser.add_noise(latents, noise, levels[:1].expand(len(latents)))
    image = latents
    for now, following in pairwise(levels):
        both = torch.cat([noisy, noisy])
        conditional, empty = denoiser.predict(both, now.expand(len(both)), conditions).chunk(2)
        image, rest = _image_and_noise(denoiser, noisy, empty + guidance * (conditional - empty), now)
        noisy = denoiser.add_noise(image, rest, following.expand(len(noisy)))
    return image


def _image_and_noise(denoiser: Denoiser, noisy: Tensor, prediction: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image and the noise that a prediction stands for: both are lines in them, whatever is predicted."""
    one, zero, t = (
        torch.ones(1, 1, 1, 1, device=noisy.device),
        torch.zeros(1, 1, 1, 1, device=noisy.device),
        timestep[None],
    )
    a, b = denoiser.add_noise(one, zero, t), denoiser.add_noise(zero, one, t)  # noisy = a image + b noise
    c, d = denoiser.target(one, zero, t), denoiser.target(zero, one, t)  # prediction = c image + d noise
    determinant = a * d - b * c
    return (d * noisy - b * prediction) / determinant, (a * prediction - c * noisy) / determinant


def _pixels(dataset: PreferenceDataset, pair: PreferencePair) -> Tensor:
    """Return the rejected picture as [1, 3, h, w] in [0, 1], cut to multiples of 8 pixels."""
    image = read_image(dataset.image_paths(pair)[1])
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    return pixels[..., : image.height // 8 * 8, : image.width // 8 * 8]
