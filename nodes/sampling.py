"""Drawing images of several prompts in one batch, each from its own seed, exactly as the stock KSampler does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.denoiser import StartImage
from .native import refusals

Condition = list  # what CLIPTextEncode returns: [[Tensor [1, t, d], {"pooled_output": Tensor, ...}]]


@dataclass(frozen=True)
class SamplerSettings:
    """The stock KSampler's settings, and the size of the image."""

    sampler_name: str
    scheduler: str
    steps: int
    cfg: float
    width_px: int
    height_px: int


def encode_prompt(clip, text: str) -> Condition:
    """Return the condition the stock CLIPTextEncode gives."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def sample_latents(
    model,
    positive: Sequence[Condition],
    negative: Sequence[Condition],
    seeds: Sequence[int],
    settings: SamplerSettings,
    on_image_step: Callable[[int], None] | None = None,
    *,
    start: StartImage | None = None,
) -> Tensor:
    """Sample one latent per condition and seed.

    For samplers without noise of their own a latent is the one the stock KSampler gives for that prompt and seed; the
    others (ancestral, SDE) draw their noise for the whole batch, so there it holds in batches of one.

    Args:
        positive: one condition an image; those that can share a forward pass do.
        negative: one condition of classifier-free guidance an image.
        seeds: one seed an image.
        on_image_step: called after every sampling step with the number of images in it.
        start: latents to begin with instead of empty ones, one an image, and the KSampler's denoise.

    Returns:
        Tensor [b, c, h, w] in the order of `positive`.
    """
    latents: list[Tensor] = [torch.empty(0)] * len(positive)
    for group in _groups(list(zip(positive, negative, strict=True))):
        wanted, unwanted = (_join([conditions[i] for i in group]) for conditions in (positive, negative))
        begin = StartImage(start.latents[group], start.denoise) if start else None
        its_seeds = [seeds[i] for i in group]
        together = _sample_group(model, wanted, unwanted, its_seeds, settings, on_image_step, begin)
        for i, latent in zip(group, together.split(1), strict=True):
            latents[i] = latent
    return torch.cat(latents)


def _sample_group(model, positive, negative, seeds, settings, on_image_step, start) -> Tensor:
    empty = torch.zeros(
        [1, 4, settings.height_px // 8, settings.width_px // 8],
        device=comfy.model_management.intermediate_device(),
        dtype=comfy.model_management.intermediate_dtype(),
    )
    empty = comfy.sample.fix_empty_latent_channels(model, empty, downscale_ratio_spacial=8)
    noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])

    def after_step(step: int, denoised: Tensor, latent: Tensor, num_steps: int) -> None:
        if on_image_step:
            on_image_step(len(seeds))

    with refusals.clip_named():
        return comfy.sample.sample(
            model,
            noise,
            settings.steps,
            settings.cfg,
            settings.sampler_name,
            settings.scheduler,
            positive,
            negative,
            start.latents if start else empty.repeat(len(seeds), *[1] * (empty.ndim - 1)),
            denoise=start.denoise if start else 1.0,
            callback=after_step,
            disable_pbar=True,
            seed=seeds[0],
        )


def _groups(conditions: Sequence[tuple[Condition, Condition]]) -> list[list[int]]:
    """Return indices of conditions that can be joined: single entries of equal shapes and equal other settings."""
    groups: dict[object, list[int]] = {}
    for index, both in enumerate(conditions):
        can_join = all(len(condition) == 1 for condition in both)
        groups.setdefault(tuple(map(_signature, both)) if can_join else index, []).append(index)
    return list(groups.values())


def _signature(condition: Condition) -> tuple:
    tensor, options = condition[0]
    described = {k: tuple(v.shape) if isinstance(v, Tensor) else repr(v) for k, v in options.items()}
    return (tuple(tensor.shape), *sorted(described.items()))


def _join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions of one group along the batch: n times [1, t, d] -> [n, t, d]."""
    if len(conditions) == 1:
        return conditions[0]
    options = dict(conditions[0][0][1])
    for key, value in options.items():
        if isinstance(value, Tensor):
            options[key] = torch.cat([condition[0][1][key] for condition in conditions])
    return [[torch.cat([condition[0][0] for condition in conditions]), options]]


def decode_latents(vae, latents: Tensor) -> list[Image.Image]:
    """Decode latents [b, c, h, w] to the pictures the stock VAEDecode and SaveImage give."""
    pixels = vae.decode(latents)
    return to_images(pixels.reshape(-1, *pixels.shape[-3:]))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn an IMAGE [b, h, w, 3] with values in [0, 1] into pictures, rounded as the stock SaveImage does."""
    values = np.clip(255.0 * pixels[..., :3].cpu().numpy(), 0, 255).astype(np.uint8)
    return [Image.fromarray(value) for value in values]


def to_pixels(picture: Image.Image) -> Tensor:
    """Turn a picture into an IMAGE [1, h, w, 3] with values in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]
