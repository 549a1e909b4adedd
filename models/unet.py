"""Building a diffusers UNet of any layout that the weights ask for."""

from typing import Any

import torch
from torch import Tensor, nn

from .unet_keys import UNetLayout, ldm_prefixes, rename, unet_config
from .weights_file import WeightsFile, fill


class NoAttention(nn.Module):
    """Stands where a reduced UNet has no transformer behind a residual block but diffusers' block class calls one."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor]:
        return (hidden_states,)


def build_unet(layout: UNetLayout) -> nn.Module:
    """Return a diffusers UNet2DConditionModel of this layout on the meta device (no weights yet)."""
    from diffusers import UNet2DConditionModel  # imported where needed: it takes seconds

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**unet_config(layout))
    for blocks, depths in (
        (unet.down_blocks, layout.input_depths),
        (unet.up_blocks, tuple(reversed(layout.output_depths))),
    ):
        for block, depths_of_level in zip(blocks, depths, strict=True):
            if any(depths_of_level):
                for layer, depth in enumerate(depths_of_level):
                    if not depth:
                        block.attentions[layer] = NoAttention()
    return unet


def load_unet(
    file: WeightsFile, prefix: str, layout: UNetLayout, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Build the UNet and fill it from ldm keys under `prefix`.

    Raises:
        InputError: a weight is missing or has another shape than the layout asks for.
    """
    unet = build_unet(layout)
    names = ldm_prefixes(layout)
    fill(unet, lambda key: file.tensor(prefix + rename(key, names)), dtype, device, file.path)
    return unet
