"""Images to the latents a UNet sees, and back: Stable Diffusion's VAE, or the small TAESD in its place."""

import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .weights_file import WeightsFile, fill


class Vae:
    """An autoencoder together with the numbers between its latents and those of the UNet.

    UNet latents = (encoder output / scale + shift) · scaling_factor; for an AutoencoderKL scale is 1.

    Args:
        model: diffusers AutoencoderKL or AutoencoderTiny.
        scaling_factor: of the model family (SD1 and SD2 0.18215, SDXL 0.13025, SD3 1.5305, FLUX 0.3611).
        scale, shift: TAESD's `vae_scale` and `vae_shift`, by which ComfyUI turns its output into VAE latents; the
            shift less that of the family (SD3 0.0609, FLUX 0.1159).
    """

    def __init__(self, model: Any, scaling_factor: float, scale: float = 1.0, shift: float = 0.0):
        self.model, self.scaling_factor, self.scale, self.shift = model, scaling_factor, scale, shift

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents as the UNet sees them.

        Args:
            images: [b, 3, h, w] in [0, 1]; h and w are multiples of 8 pixels.
            generator: draw from the encoder's distribution; None takes its mode (TAESD has no distribution).

        Returns:
            [b, c, h/8, w/8] float32.
        """
        pixels = images.to(self.model.device, self.model.dtype) * 2 - 1
        encoded = self.model.encode(pixels)
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        else:
            distribution = encoded.latent_dist
            latents = distribution.mode() if generator is None else distribution.sample(generator)
        return (latents.float() / self.scale + self.shift) * self.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images [b, 3, h, w] float32 in [0, 1] from UNet latents [b, c, h/8, w/8]."""
        raw = (latents.float() / self.scaling_factor - self.shift) * self.scale
        pixels = self.model.decode(raw.to(self.model.device, self.model.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def decode_images(self, latents: Tensor) -> list[Image.Image]:
        """Return one RGB image for each of the latents [b, c, h, w]."""
        pixels = (self.decode_latents(latents) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]


def has_vae(file: WeightsFile, prefix: str) -> bool:
    return any(f"{prefix}{key}" in file for key in ("decoder.conv_in.weight", "taesd_decoder.1.weight"))


def load_vae(
    file: WeightsFile,
    prefix: str,
    scaling_factor: float,
    latent_shift: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Vae:
    """Load the VAE under `prefix`; a TAESD is recognised by its decoder, as ComfyUI does.

    UNet latents = (VAE latents - latent_shift) · scaling_factor.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    if f"{prefix}taesd_decoder.1.weight" in file:
        return _load_taesd(file, prefix, scaling_factor, latent_shift, dtype, device)
    from diffusers import AutoencoderKL  # imported where needed: it takes seconds

    with torch.device("meta"):
        model: Any = AutoencoderKL(**_kl_config(file, prefix))
    num_levels = len(model.config.block_out_channels)
    fill(model, lambda key: file.tensor(prefix + kl_key(key, num_levels)), vae_precision(dtype), device, file.path)
    return Vae(model, scaling_factor, shift=-latent_shift)


def vae_precision(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to run an AutoencoderKL in: it overflows in float16, where ComfyUI does not run it either."""
    return torch.float32 if dtype == torch.float16 else dtype


def _kl_config(file: WeightsFile, prefix: str) -> dict[str, Any]:
    shapes = file.shapes(prefix)
    channels: list[int] = []
    while (first := f"encoder.down.{len(channels)}.block.0.conv1.weight") in shapes:
        channels.append(shapes[first][0])
    num_blocks = len({match[1] for key in shapes if (match := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key))})
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": num_blocks,
        "latent_channels": file.tensor(f"{prefix}decoder.conv_in.weight").shape[1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


_KL_WORDS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
}
_KL_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)")


def kl_key(key: str, num_levels: int) -> str:
    """Return the ldm name of a weight of diffusers' AutoencoderKL (without `first_stage_model.`).

    Attention projections are 1x1 convolutions in ldm: same numbers, two more axes.
    """
    for ours, theirs in _KL_WORDS.items():
        key = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, key)

    def block(match: re.Match[str]) -> str:
        way, number, part, layer = match.groups()
        level = int(number) if way == "down" else num_levels - 1 - int(number)  # ldm counts both from the finest
        ours = {"resnets": f"block.{layer}", "downsamplers": "downsample", "upsamplers": "upsample"}[part]
        return f"{way}.{level}.{ours}"

    return _KL_BLOCK.sub(block, key)


def _load_taesd(
    file: WeightsFile,
    prefix: str,
    scaling_factor: float,
    latent_shift: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Vae:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        model: Any = AutoencoderTiny(latent_channels=file.tensor(f"{prefix}taesd_decoder.1.weight").shape[1])
    fill(model, lambda key: file.tensor(prefix + taesd_key(key)), dtype, device, file.path)
    numbers = {
        name: float(file.tensor(prefix + name)) if prefix + name in file else default
        for name, default in (("vae_scale", 1.0), ("vae_shift", 0.0))
    }
    return Vae(model, scaling_factor, numbers["vae_scale"], numbers["vae_shift"] - latent_shift)


def taesd_key(key: str) -> str:
    """Return ComfyUI's name of a weight of diffusers' AutoencoderTiny (without `first_stage_model.`)."""
    coder, _, index, rest = key.split(".", 3)
    if coder == "decoder":
        index = str(int(index) + 1)  # ComfyUI's decoder begins with a clamp
    return f"taesd_{coder}.{index}.{rest}"
