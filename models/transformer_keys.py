"""SD3 and FLUX.1 transformers: layout read from a state dict, where each diffusers weight lies in a ComfyUI file.

Stability's and Black Forest Labs' names keep query, key and value in one tensor; diffusers has one layer for each.
Source: comfy/utils.py mmdit_to_diffusers and flux_to_diffusers, diffusers/loaders/single_file_utils.py (whose FLUX
function knows no other width than 3072, and holds the model twice).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .unet_keys import rename

LATENT_CHANNELS = 16


@dataclass(frozen=True)
class TransformerLayout:
    """What the weights' names and shapes say of a transformer."""

    family: str
    """"sd3" (also SD3.5) or "flux"."""
    width: int
    num_layers: int
    """Blocks with an image and a text stream."""
    context_dim: int
    pooled_dim: int
    in_channels: int
    """Latent channels that go in; more than 16 in inpainting and editing models."""
    num_single_layers: int = 0
    """FLUX: blocks over the joined streams."""
    has_guidance: bool = False
    """FLUX: the guidance scale is an input (dev), not there in schnell."""
    qk_norm: bool = False
    """SD3.5: queries and keys are normalised (FLUX's always are)."""
    dual_layers: tuple[int, ...] = ()
    """SD3.5 medium: blocks with a second attention, over the image alone."""
    pos_embed_size: int = 0
    """SD3: patches in a row of the learned positions."""


def infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> TransformerLayout | None:
    """Read the layout from native keys (without prefix) and shapes; None where this is neither SD3 nor FLUX.1."""
    if {"joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight", "pos_embed"} <= shapes.keys():
        width, in_channels = shapes["x_embedder.proj.weight"][:2]
        return TransformerLayout(
            "sd3",
            width,
            num_layers=_count(shapes, "joint_blocks"),
            context_dim=shapes["context_embedder.weight"][1],
            pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
            in_channels=in_channels,
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            dual_layers=tuple(
                sorted(int(key.split(".")[1]) for key in shapes if key.endswith(".x_block.attn2.qkv.weight"))
            ),
            pos_embed_size=math.isqrt(shapes["pos_embed"][1]),
        )
    # FLUX.2 and Chroma, which share most names, have no vector_in.
    if {"double_blocks.0.img_attn.qkv.weight", "txt_in.weight", "vector_in.in_layer.weight"} <= shapes.keys():
        width, patch_width = shapes["img_in.weight"]
        return TransformerLayout(
            "flux",
            width,
            num_layers=_count(shapes, "double_blocks"),
            context_dim=shapes["txt_in.weight"][1],
            pooled_dim=shapes["vector_in.in_layer.weight"][1],
            in_channels=patch_width // 4,
            num_single_layers=_count(shapes, "single_blocks"),
            has_guidance="guidance_in.in_layer.weight" in shapes,
        )
    return None


def _count(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{blocks}.")})


def transformer_config(layout: TransformerLayout) -> dict[str, Any]:
    """Return the arguments of diffusers' SD3Transformer2DModel or FluxTransformer2DModel for a layout."""
    shared = {
        "num_layers": layout.num_layers,
        "joint_attention_dim": layout.context_dim,
        "pooled_projection_dim": layout.pooled_dim,
    }
    if layout.family == "flux":
        return shared | {
            "in_channels": 4 * layout.in_channels,
            "num_single_layers": layout.num_single_layers,
            "num_attention_heads": layout.width // 128,
            "guidance_embeds": layout.has_guidance,
        }
    return shared | {
        "in_channels": layout.in_channels,
        "num_attention_heads": layout.width // 64,
        "caption_projection_dim": layout.width,
        "pos_embed_max_size": layout.pos_embed_size,
        "dual_attention_layers": layout.dual_layers,
        "qk_norm": "rms_norm" if layout.qk_norm else None,
    }


_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX_BLOCK = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE_BLOCK = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
# Where in the joined tensor a layer's rows begin, in multiples of the width.
_FIRST_ROW = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2, "proj_mlp": 3}
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class NativeWeight:
    """A diffusers weight in a native file: the rows of `key` (None: all); `swapped`: its two halves change places."""

    key: str
    rows: slice | None = None
    swapped: bool = False


def native_weight(key: str, layout: TransformerLayout) -> NativeWeight:
    """Return where a weight of the diffusers transformer lies in a native file (without prefix)."""
    if key == "pos_embed.pos_embed":
        return NativeWeight("pos_embed")
    is_flux = layout.family == "flux"
    match = _BLOCK.fullmatch(key)
    if not match:
        # diffusers' final norm wants scale before shift.
        return NativeWeight(rename(key, _FLUX if is_flux else _SD3), swapped=key.startswith("norm_out."))
    blocks, number, inner = match.groups()
    if blocks == "single_transformer_blocks":
        native = f"single_blocks.{number}.{rename(inner, _FLUX_SINGLE_BLOCK)}"
    elif is_flux:
        native = f"double_blocks.{number}.{rename(inner, _FLUX_BLOCK)}"
    else:
        native = f"joint_blocks.{number}.{rename(inner, _SD3_BLOCK)}"
    layer = inner.split(".")[-2]
    first = _FIRST_ROW.get(layer)
    if first is None:
        # SD3's last block throws its text stream away, so its norm is of the final kind.
        is_final = not is_flux and layer == "linear" and int(number) == layout.num_layers - 1
        return NativeWeight(native, swapped=is_final and inner.startswith("norm1_context."))
    last = None if layer == "proj_mlp" else (first + 1) * layout.width
    return NativeWeight(native, slice(first * layout.width, last))
