"""Stable Diffusion UNets: layout read from a state dict, names in the two spellings (ldm's and diffusers').

Source: the inference of the layout follows comfy/model_detection.py, the ldm names CompVis/stable-diffusion.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")
Depths = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UNetLayout:
    """What the weights' names and shapes say of a UNet. A level is one resolution, the finest first."""

    model_channels: int
    channel_mult: tuple[int, ...]
    """Channels of each level, in multiples of model_channels."""
    input_depths: Depths
    """Per level, per residual block: number of transformer blocks behind it (0: no attention)."""
    output_depths: Depths
    """The same of the way up, one block more a level; levels still the finest first, blocks in running order."""
    middle_depth: int | None
    """Transformer blocks in the middle; 0: a single residual block; None: no middle."""
    context_dim: int
    linear_projections: bool = False
    """proj_in and proj_out are linear layers (SD2, SDXL) rather than 1x1 convolutions (SD1)."""
    vector_dim: int | None = None
    """Width of the vector condition (SDXL: pooled text and sizes)."""
    in_channels: int = 4


def infer_layout(shapes: Mapping[str, tuple[int, ...]]) -> UNetLayout | None:
    """Read the layout from ldm keys (without prefix) and shapes; None where this is no text-conditioned ldm UNet."""
    context_dims = {shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")}
    if "input_blocks.0.0.weight" not in shapes or len(context_dims) != 1:
        return None
    model_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    channels: list[int] = [model_channels]
    inputs: list[list[int]] = [[]]
    index = 1
    while True:
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            inputs.append([])
            channels.append(channels[-1])
        elif f"{block}.0.out_layers.3.weight" in shapes:
            inputs[-1].append(_depth(shapes, f"{block}.1"))
            channels[-1] = shapes[f"{block}.0.out_layers.3.weight"][0]
        else:
            break
        index += 1

    outputs: list[tuple[int, ...]] = []
    index = 0
    for level in reversed(inputs):
        outputs.insert(0, tuple(_depth(shapes, f"output_blocks.{index + i}.1") for i in range(len(level) + 1)))
        index += len(level) + 1
    has_middle = "middle_block.0.in_layers.0.weight" in shapes
    return UNetLayout(
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in channels),
        input_depths=tuple(map(tuple, inputs)),
        output_depths=tuple(outputs),
        middle_depth=_depth(shapes, "middle_block.1") if has_middle else None,
        context_dim=context_dims.pop(),
        linear_projections=any(key.endswith(".proj_in.weight") and len(shapes[key]) == 2 for key in shapes),
        vector_dim=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
        in_channels=in_channels,
    )


def _depth(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    found = re.compile(re.escape(f"{prefix}.transformer_blocks.") + r"(\d+)\.")
    return len({match[1] for key in shapes if (match := found.match(key))})


_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_prefixes(layout: UNetLayout) -> dict[str, str]:
    """Return diffusers module name -> ldm module name, for every module below which both spell names alike."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add_residual(diffusers: str, ldm: str) -> None:
        names.update({f"{diffusers}.{ours}": f"{ldm}.{theirs}" for ours, theirs in _RESIDUAL.items()})

    num_levels = len(layout.channel_mult)
    index = 1
    for level, depths in enumerate(layout.input_depths):
        block = f"down_blocks.{level}"
        for layer in range(len(depths)):
            add_residual(f"{block}.resnets.{layer}", f"input_blocks.{index}.0")
            names[f"{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if level < num_levels - 1:
            names[f"{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1

    add_residual("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    add_residual("mid_block.resnets.1", "middle_block.2")

    index = 0
    for level, depths in enumerate(reversed(layout.output_depths)):
        block = f"up_blocks.{level}"
        for layer, depth in enumerate(depths):
            add_residual(f"{block}.resnets.{layer}", f"output_blocks.{index}.0")
            if depth:
                names[f"{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            if layer == len(depths) - 1 and level < num_levels - 1:
                names[f"{block}.upsamplers.0.conv"] = f"output_blocks.{index}.{2 if depth else 1}.conv"
            index += 1
    return names


def to_ldm(state: Mapping[str, Value], layout: UNetLayout) -> dict[str, Value]:
    """Rename the keys of a diffusers UNet's state dict to ldm's (without `model.diffusion_model.`)."""
    names = ldm_prefixes(layout)
    return {rename(key, names): value for key, value in state.items()}


def to_diffusers(state: Mapping[str, Value], layout: UNetLayout) -> dict[str, Value]:
    """Rename ldm's keys (without `model.diffusion_model.`) to those of a diffusers UNet; the inverse of `to_ldm`."""
    names = {ldm: diffusers for diffusers, ldm in ldm_prefixes(layout).items()}
    return {rename(key, names): value for key, value in state.items()}


def rename(key: str, names: Mapping[str, str]) -> str:
    """Replace the longest prefix of `key` (whole words between dots) that `names` knows.

    Raises:
        KeyError: it knows none.
    """
    head = key
    while head:
        head = head.rpartition(".")[0]
        if head in names:
            return names[head] + key[len(head) :]
    raise KeyError(key)


def unet_config(layout: UNetLayout) -> dict[str, Any]:
    """Return the arguments of diffusers' UNet2DConditionModel for a layout."""
    channels = [layout.model_channels * factor for factor in layout.channel_mult]
    up_depths = tuple(reversed(layout.output_depths))
    down = [_alike(depths) for depths in layout.input_depths]
    if not any(layout.input_depths[-1]):
        down[-1] = layout.middle_depth or 1  # a level without attention ignores this; the middle takes it from here
    config: dict[str, Any] = {
        "in_channels": layout.in_channels,
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in layout.input_depths
        ),
        "up_block_types": tuple("CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up_depths),
        "mid_block_type": _middle_type(layout.middle_depth),
        "layers_per_block": tuple(map(len, layout.input_depths)),
        "transformer_layers_per_block": tuple(down),
        "reverse_transformer_layers_per_block": tuple(map(_alike, up_depths)),
        "cross_attention_dim": layout.context_dim,
        "use_linear_projection": layout.linear_projections,
        # diffusers calls the number of heads attention_head_dim: SD1 has 8 heads, SD2 and SDXL heads of 64 channels.
        "attention_head_dim": tuple(width // 64 for width in channels) if layout.linear_projections else 8,
    }
    if layout.vector_dim is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": layout.vector_dim,
        }
    return config


def _alike(depths: tuple[int, ...]) -> int | tuple[int, ...]:
    return depths[0] if len(set(depths)) == 1 else depths


def _middle_type(depth: int | None) -> str | None:
    if depth is None:
        return None
    return "UNetMidBlock2DCrossAttn" if depth else "UNetMidBlock2D"
