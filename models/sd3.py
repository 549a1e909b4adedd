"""SD3 and SD3.5. Stability's names keep query, key and value in one tensor; diffusers has one layer for each.

Source: comfy/utils.py mmdit_to_diffusers, diffusers/loaders/single_file_utils.py.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Conditions
from .family import Shapes, T5Kind
from .flow import FlowDenoiser
from .noise_schedule import FlowNoise
from .t5 import T5Tower
from .text_encoders import SD3_CLIP_L, SDXL_CLIP_G, ClipTower, TextEncoder
from .transformer import NativeWeight, TransformerFamily
from .unet_keys import rename
from .weights_file import WeightsFile

SHIFT = 3.0  # comfy/supported_models.py and SD3's scheduler config


@dataclass(frozen=True)
class SD3Layout:
    """What the weights' names and shapes say of an SD3 transformer."""

    width: int
    num_layers: int
    """Blocks with an image and a text stream."""
    context_dim: int
    pooled_dim: int
    in_channels: int
    qk_norm: bool = False
    """SD3.5: queries and keys are normalised."""
    dual_layers: tuple[int, ...] = ()
    """SD3.5 medium: blocks with a second attention, over the image alone."""
    pos_embed_size: int = 0
    """Patches in a row of the learned positions."""


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


class SD3TextEncoder(TextEncoder):
    """CLIP-L and CLIP-G side by side, filled up with zeros to T5's width, then T5's tokens behind them.

    Args:
        towers: CLIP-L, CLIP-G.
        t5: None where the checkpoint has none; then, as in ComfyUI, there are only CLIP's tokens.
        context_dim: the width that the transformer takes.
    """

    def __init__(self, towers: Sequence[ClipTower], t5: T5Tower | None, context_dim: int):
        super().__init__(towers)
        self.t5, self.context_dim = t5, context_dim

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `hidden_states` [n, 77 or 154, 4096] and `pooled` [n, 768 + 1280]; float32."""
        hidden, pooled = zip(*(tower.encode(prompts) for tower in self.towers), strict=True)
        joined = torch.cat(hidden, dim=-1)
        joined = nn.functional.pad(joined, (0, self.context_dim - joined.shape[-1]))
        if self.t5:
            joined = torch.cat([joined, self.t5.encode(prompts)], dim=1)
        return {"hidden_states": joined, "pooled": torch.cat(pooled, dim=-1)}


_WORDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK_WORDS = {
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
_FIRST_ROW = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


class SD3(TransformerFamily[SD3Layout]):
    name, diffusers_class, denoiser_class = "sd3", "SD3Transformer2DModel", SD3Denoiser
    latent_scale, latent_shift = 1.5305, 0.0609
    towers = (
        (SD3_CLIP_L, ("text_encoders.clip_l.",)),
        (SDXL_CLIP_G, ("text_encoders.clip_g.",)),
    )
    t5 = T5Kind(77, 3, required=False)

    def infer(self, shapes: Shapes) -> SD3Layout | None:
        if not {"joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight", "pos_embed"} <= shapes.keys():
            return None
        width, in_channels = shapes["x_embedder.proj.weight"][:2]
        return SD3Layout(
            width,
            num_layers=len({key.split(".")[1] for key in shapes if key.startswith("joint_blocks.")}),
            context_dim=shapes["context_embedder.weight"][1],
            pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
            in_channels=in_channels,
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            dual_layers=tuple(
                sorted(int(key.split(".")[1]) for key in shapes if key.endswith(".x_block.attn2.qkv.weight"))
            ),
            pos_embed_size=math.isqrt(shapes["pos_embed"][1]),
        )

    def config(self, layout: SD3Layout) -> dict[str, Any]:
        return {
            "num_layers": layout.num_layers,
            "joint_attention_dim": layout.context_dim,
            "pooled_projection_dim": layout.pooled_dim,
            "in_channels": layout.in_channels,
            "num_attention_heads": layout.width // 64,
            "caption_projection_dim": layout.width,
            "pos_embed_max_size": layout.pos_embed_size,
            "dual_attention_layers": layout.dual_layers,
            "qk_norm": "rms_norm" if layout.qk_norm else None,
        }

    def native_weight(self, key: str, layout: SD3Layout) -> NativeWeight:
        if key == "pos_embed.pos_embed":
            return NativeWeight("pos_embed")
        match = _BLOCK.fullmatch(key)
        if not match:
            # diffusers' final norm wants scale before shift.
            return NativeWeight(rename(key, _WORDS), swapped=key.startswith("norm_out."))
        number, inner = match.groups()
        native = f"joint_blocks.{number}.{rename(inner, _BLOCK_WORDS)}"
        first = _FIRST_ROW.get(inner.split(".")[-2])
        if first is None:
            # The last block throws its text stream away, so its norm is of the final kind.
            is_final = inner.startswith("norm1_context.linear.") and int(number) == layout.num_layers - 1
            return NativeWeight(native, swapped=is_final)
        return NativeWeight(native, slice(first * layout.width, (first + 1) * layout.width))

    def file_noise(self, file: WeightsFile, prefix: str, layout: SD3Layout) -> FlowNoise:
        return FlowNoise(SHIFT)

    def join(self, towers: Sequence[ClipTower], t5: T5Tower | None, context_dim: int) -> TextEncoder:
        return SD3TextEncoder(towers, t5, context_dim)
