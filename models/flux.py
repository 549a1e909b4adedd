"""FLUX.1 dev and schnell. Their names keep query, key and value in one tensor; diffusers has one layer for each.

Source: comfy/utils.py flux_to_diffusers, diffusers/loaders/single_file_utils.py (whose function knows no other width
than 3072, and holds the model twice).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditions
from .family import Shapes, T5Kind
from .flow import FlowDenoiser
from .noise_schedule import FlowNoise
from .t5 import T5Tower
from .text_encoders import FLUX_CLIP_L, ClipTower, TextEncoder
from .transformer import NativeWeight, TransformerFamily
from .unet_keys import rename
from .weights_file import WeightsFile

# dev: exp(1.15), ComfyUI's default shift and that of FLUX's own schedule at 1024 px; schnell: none.
DEV_SHIFT, SCHNELL_SHIFT = 3.1581929096897681, 1.0
# dev was distilled from a model with guidance, whose scale is an input: ComfyUI's default, as used for images.
GUIDANCE = 3.5
_PATCH = 4  # values of a latent channel in one token


@dataclass(frozen=True)
class FluxLayout:
    """What the weights' names and shapes say of a FLUX.1 transformer."""

    width: int
    num_layers: int
    """Blocks with an image and a text stream."""
    context_dim: int
    pooled_dim: int
    in_channels: int
    num_single_layers: int = 0
    """Blocks over the joined streams."""
    has_guidance: bool = False
    """The guidance scale is an input (dev), not there in schnell."""


class FluxDenoiser(FlowDenoiser):
    """FLUX.1 dev and schnell: a diffusers FluxTransformer2DModel, which takes the image as a sequence of patches."""

    is_distilled = True

    def _velocity(self, noisy: Tensor, sigmas: Tensor, conditions: Conditions) -> Tensor:
        batch, channels, height, width = noisy.shape
        rows, columns = height // 2, width // 2
        patches = noisy.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(rows, columns, 3, device=noisy.device)
        places[..., 1] = torch.arange(rows, device=noisy.device)[:, None]
        places[..., 2] = torch.arange(columns, device=noisy.device)
        context = conditions["hidden_states"]
        guidance = torch.full_like(sigmas, GUIDANCE) if self.model.config.guidance_embeds else None
        levels = [sigmas * 1000] if guidance is None else [sigmas * 1000, guidance * 1000]
        # Unlike ComfyUI, diffusers rounds these to the compute dtype, and bfloat16 tells 896 from 900 only.
        hook = self.model.time_text_embed.register_forward_pre_hook(lambda module, args: (*levels, args[-1]))
        try:
            velocity = self.model(
                patches.reshape(batch, rows * columns, channels * 4),
                encoder_hidden_states=context,
                pooled_projections=conditions["pooled"],
                timestep=sigmas,  # the model multiplies by 1000 itself, and guidance too
                img_ids=places.view(-1, 3),
                txt_ids=torch.zeros(context.shape[1], 3, device=noisy.device),
                guidance=guidance,
                return_dict=False,
            )[0]
        finally:
            hook.remove()
        patches = velocity.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, channels, height, width)


class FluxTextEncoder(TextEncoder):
    """T5's tokens, and CLIP-L for the pooled embedding alone."""

    def __init__(self, towers: Sequence[ClipTower], t5: T5Tower):
        super().__init__(towers)
        self.t5 = t5

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return `hidden_states` [n, 256, 4096] and `pooled` [n, 768]; float32."""
        pooled = self.towers[0].encode(prompts)[1]
        assert pooled is not None
        return {"hidden_states": self.t5.encode(prompts), "pooled": pooled}


_WORDS = {
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
_BLOCK_WORDS = {
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
_SINGLE_BLOCK_WORDS = {
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


class Flux(TransformerFamily[FluxLayout]):
    name, diffusers_class, denoiser_class = "flux", "FluxTransformer2DModel", FluxDenoiser
    latent_scale, latent_shift = 0.3611, 0.1159
    towers = ((FLUX_CLIP_L, ("text_encoders.clip_l.",)),)
    t5 = T5Kind(256, 2, required=True)

    def infer(self, shapes: Shapes) -> FluxLayout | None:
        # FLUX.2 and Chroma, which share most names, have no vector_in.
        if not {"double_blocks.0.img_attn.qkv.weight", "txt_in.weight", "vector_in.in_layer.weight"} <= shapes.keys():
            return None
        width, patch_width = shapes["img_in.weight"]
        return FluxLayout(
            width,
            num_layers=_count(shapes, "double_blocks"),
            context_dim=shapes["txt_in.weight"][1],
            pooled_dim=shapes["vector_in.in_layer.weight"][1],
            in_channels=patch_width // _PATCH,
            num_single_layers=_count(shapes, "single_blocks"),
            has_guidance="guidance_in.in_layer.weight" in shapes,
        )

    def config(self, layout: FluxLayout) -> dict[str, Any]:
        return {
            "num_layers": layout.num_layers,
            "joint_attention_dim": layout.context_dim,
            "pooled_projection_dim": layout.pooled_dim,
            "in_channels": _PATCH * layout.in_channels,
            "num_single_layers": layout.num_single_layers,
            "num_attention_heads": layout.width // 128,
            "guidance_embeds": layout.has_guidance,
        }

    def config_channels(self, config: Mapping[str, Any]) -> int:
        return super().config_channels(config) // _PATCH if "in_channels" in config else self.latent_channels

    def native_weight(self, key: str, layout: FluxLayout) -> NativeWeight:
        match = _BLOCK.fullmatch(key)
        if not match:
            # diffusers' final norm wants scale before shift.
            return NativeWeight(rename(key, _WORDS), swapped=key.startswith("norm_out."))
        blocks, number, inner = match.groups()
        if blocks == "single_transformer_blocks":
            native = f"single_blocks.{number}.{rename(inner, _SINGLE_BLOCK_WORDS)}"
        else:
            native = f"double_blocks.{number}.{rename(inner, _BLOCK_WORDS)}"
        layer = inner.split(".")[-2]
        first = _FIRST_ROW.get(layer)
        if first is None:
            return NativeWeight(native)
        last = None if layer == "proj_mlp" else (first + 1) * layout.width
        return NativeWeight(native, slice(first * layout.width, last))

    def spelling(self, key: str, file: WeightsFile) -> str:
        is_first_release = key.endswith("_norm.weight") and key not in file
        return key.removesuffix("weight") + "scale" if is_first_release else key

    def file_noise(self, file: WeightsFile, prefix: str, layout: FluxLayout) -> FlowNoise:
        return FlowNoise(DEV_SHIFT if layout.has_guidance else SCHNELL_SHIFT)

    def folder_noise(self, scheduler: Mapping[str, Any], where: str) -> FlowNoise:
        if scheduler.get("use_dynamic_shifting"):  # dev: the shift at 1024 px, which ComfyUI takes for all sizes
            return FlowNoise(math.exp(scheduler.get("max_shift", 1.15)))
        return super().folder_noise(scheduler, where)

    def join(self, towers: Sequence[ClipTower], t5: T5Tower | None, context_dim: int) -> TextEncoder:
        assert t5 is not None
        return FluxTextEncoder(towers, t5)


def _count(shapes: Shapes, blocks: str) -> int:
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{blocks}.")})
