"""Families of models that ComfyUI can load, as tiny random models on a CPU. Needs ComfyUI alone (COMFYUI_PATH).

Import it before anything of ComfyUI: it sets ComfyUI up.
"""

import logging
import math
import os
import sys
from dataclasses import dataclass, field

ROOT = os.environ.get("COMFYUI_PATH")
if not ROOT:
    raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
sys.path.insert(0, ROOT)
ARGUMENTS, sys.argv = sys.argv[1:], ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402

logging.disable(logging.WARNING)
import comfy.model_base as bases  # noqa: E402
import comfy.supported_models as supported  # noqa: E402


@dataclass
class Case:
    """A tiny model: ComfyUI's config and base class, its UNet config, the latents' shape, the text's width."""

    config: type
    base: type
    unet: dict
    latents: tuple[int, ...]
    text_dim: int = 32
    extra: dict = field(default_factory=dict)
    """Other tensors of a condition, [...] without batch; a callable of the number of tokens where they go with it."""


def pooled(width: int = 32) -> dict:
    return {"pooled_output": lambda tokens: torch.randn(width)}


SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_head_channels": -1,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SDXL = SD15 | {
    "use_linear_in_transformer": True,
    "adm_in_channels": 32 + 6 * 256,
    "num_classes": "sequential",
    "num_heads": -1,
    "num_head_channels": 32,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
}
SD3 = {
    "in_channels": 16,
    "depth": 2,
    "patch_size": 2,
    "out_channels": 16,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 64 * 64,
    "pos_embed_max_size": 64,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
    "qkv_bias": True,
    "input_size": None,
    "qk_norm": "rms",
}
FLUX1 = {
    "image_model": "flux",
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX1 | {
    "image_model": "flux2",
    "patch_size": 1,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "qkv_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CHROMA = {name: value for name, value in FLUX1.items() if name != "guidance_embed"} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 128,
    "n_layers": 1,
}
LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
    "qk_norm": True,
    "rope_theta": 10000.0,
}
Z_IMAGE = LUMINA2 | {
    "dim": 256,
    "n_heads": 8,
    "n_kv_heads": 8,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
    "ffn_dim_multiplier": 2.0,
    "norm_eps": 1e-5,
    "rope_theta": 256.0,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 128,
    "ffn_dim": 256,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "text_len": 512,
}
HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_channels": [32, 32],
    "text_emb_dim": 32,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (8, 12, 12),
    "max_resolution": [128, 128],
    "llama_layers": [0, 1],
}
COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 4,
    "crossattn_emb_channels": 32,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}
KREA2 = {
    "image_model": "krea2",
    "features": 128,
    "tdim": 32,
    "txtdim": 32,
    "heads": 4,
    "kvheads": 2,
    "multiplier": 4,
    "layers": 2,
    "patch": 2,
    "channels": 16,
    "txtlayers": 1,
    "txtheads": 4,
    "txtkvheads": 4,
}
ERNIE = {
    "image_model": "ernie",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_layers": 2,
    "ffn_hidden_size": 256,
    "in_channels": 16,
    "out_channels": 16,
    "text_in_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}
AURAFLOW = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 128,
    "n_layers": 2,
    "n_double_layers": 1,
    "n_heads": 4,
    "global_conddim": 128,
    "cond_seq_dim": 32,
    "max_seq": 1024,
}
IMAGE4, IMAGE16, FRAME16 = (4, 16, 16), (16, 16, 16), (16, 1, 16, 16)
HIDREAM_TEXT = pooled() | {"conditioning_llama3": lambda tokens: torch.randn(2, tokens, 32)}
CASES: dict[str, Case] = {
    "sd15": Case(supported.SD15, bases.BaseModel, SD15, IMAGE4),
    "sdxl": Case(supported.SDXL, bases.SDXL, SDXL, IMAGE4, extra=pooled()),
    "sd3": Case(supported.SD3, bases.SD3, SD3, IMAGE16, extra=pooled()),
    "flux1": Case(supported.Flux, bases.Flux, FLUX1, IMAGE16, extra=pooled()),
    "flux2-klein": Case(supported.Flux2, bases.Flux2, FLUX2, IMAGE16),
    "chroma": Case(supported.Chroma, bases.Chroma, CHROMA, IMAGE16),
    "z-image": Case(supported.ZImage, bases.Lumina2, Z_IMAGE, IMAGE16),
    "lumina2": Case(supported.Lumina2, bases.Lumina2, LUMINA2, IMAGE16),
    "qwen-image": Case(supported.QwenImage, bases.QwenImage, QWEN, FRAME16),
    "wan2.2": Case(supported.WAN21_T2V, bases.WAN21, WAN, FRAME16),
    "hidream-i1": Case(supported.HiDream, bases.HiDream, HIDREAM, IMAGE16, extra=HIDREAM_TEXT),
    "krea2": Case(supported.Krea2, bases.Krea2, KREA2, FRAME16),
    "auraflow": Case(supported.AuraFlow, bases.AuraFlow, AURAFLOW, IMAGE4),
    "cosmos-predict2": Case(supported.CosmosT2IPredict2, bases.CosmosPredict2, COSMOS, FRAME16),
    "ernie-image": Case(supported.ErnieImage, bases.ErnieImage, ERNIE, IMAGE16),
    "mage-flow": Case(
        supported.MageFlow, bases.MageFlow, QWEN | {"image_model": "mage_flow", "in_channels": 16}, IMAGE16
    ),
}


def random_model(case: Case, dtype: torch.dtype):
    """Return the tiny model (comfy.model_base.BaseModel) with random weights, the same ones every time."""
    torch.manual_seed(0)
    config = case.config({**case.unet, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = case.base(config, device="cpu")
    with torch.no_grad():
        for name, value in model.diffusion_model.named_parameters():
            if value.ndim >= 2:
                value.normal_(0, 1 / math.sqrt(max(1, value[0].numel())))
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, value in model.diffusion_model.named_buffers():
            if value.is_floating_point() and "pos_embed" in name:
                value.normal_(0, 0.1)
    return model.eval()
