"""Our offline loader against ComfyUI's own: the same random checkpoint gives the same numbers in both.

ComfyUI runs in a process of its own (comfyui_outputs.py), writes the checkpoints under its own names and records what
its UNet, CLIP and VAE give.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.training.soft_prompt import FILE_KEYS, SoftPromptTower

WORKER = Path(__file__).with_name("comfyui_outputs.py")
PROMPTS = ["", "a red circle with thorns"]


def tower(name, prefix, width, activation, *, layers=3, openclip=False):
    config = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 256,
        "hidden_act": activation,
    }
    return {"name": name, "prefix": f"{prefix}transformer.", "config": config, "openclip": openclip}


def unet(levels, depths, depths_up, depth_middle, context_dim, **more):
    """A UNetModel config with one residual block a level; `depths_up` lists the way up backwards, as ComfyUI's does."""
    heads = {"num_heads": 8} if context_dim == 768 else {"num_heads": -1, "num_head_channels": 64}
    return {
        "in_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [1] * len(levels),
        "channel_mult": levels,
        "transformer_depth": depths,
        "transformer_depth_output": depths_up,
        "transformer_depth_middle": depth_middle,  # -2: no middle
        "context_dim": context_dim,
        "use_linear_in_transformer": context_dim != 768,
        **heads,
        **more,
    }


def t5(width):
    """A T5 of two layers and 8200 words, which hold those of the prompts."""
    config = {"num_layers": 2, "d_model": width, "d_kv": 64, "num_heads": 2, "d_ff": 96, "vocab_size": 8200}
    return {"name": "t5xxl", "prefix": "text_encoders.t5xxl.transformer.", "config": config, "openclip": False}


MODELS = {
    "sd15": {  # the toy world's layout, but for one attention
        "unet": unet([1], [1], [1, 0], -2, 768),
        "text_models": [tower("clip_l", "cond_stage_model.", 128, "quick_gelu")],
        "taesd": True,
        "numbers": {"first_stage_model.vae_scale": 0.3, "first_stage_model.vae_shift": 0.1},
        "soft_prompt": FILE_KEYS["sd15"],
    },
    "sd20": {
        "unet": unet([1, 2], [1, 0], [1, 1, 0, 1], 1, 1024),
        "text_models": [tower("clip_h", "cond_stage_model.model.", 128, "gelu", openclip=True)],
        "taesd": False,
        "numbers": {},
    },
    "sdxl": {  # KOALA-700M's depths, the smallest SDXL that ComfyUI knows; v prediction with zero terminal SNR
        "unet": unet([1, 1, 1], [0, 2, 5], [0] * 6, -2, 2048, num_classes="sequential", adm_in_channels=2816),
        "text_models": [
            tower("clip_l", "conditioner.embedders.0.", 128, "quick_gelu"),
            tower("clip_g", "conditioner.embedders.1.model.", 192, "gelu", openclip=True),
        ],
        "taesd": True,
        "numbers": {"first_stage_model.vae_scale": 0.13025, "v_pred": [], "ztsnr": []},
        "soft_prompt": FILE_KEYS["sdxl"],
    },
    "sd3": {  # as SD3.5 medium: normalised queries and keys, a second attention in the first block
        "transformer": "sd3",
        "context_dim": 4096,  # ComfyUI fills CLIP's tokens up to this width
        "pooled_dim": 320,
        "config": {
            "input_size": None,
            "in_channels": 16,
            "depth": 2,
            "adm_in_channels": 320,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 128},
            },
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        "text_models": [
            tower("clip_l", "text_encoders.clip_l.", 128, "quick_gelu"),
            tower("clip_g", "text_encoders.clip_g.", 192, "gelu"),
            t5(4096),
        ],
        "taesd": True,
        "numbers": {"first_stage_model.vae_scale": 1.2, "first_stage_model.vae_shift": 0.2},
    },
    "flux": {
        "transformer": "flux",
        "context_dim": 96,
        "pooled_dim": 128,
        "config": {
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 128,
            "context_in_dim": 96,
            "hidden_size": 256,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        "text_models": [tower("clip_l", "text_encoders.clip_l.", 128, "quick_gelu"), t5(96)],
        "taesd": True,
        "vae_prefix": "vae.",
        "numbers": {"vae.vae_scale": 0.5, "vae.vae_shift": -0.1},
    },
}


@pytest.fixture(scope="module")
def comfyui() -> Path:
    return find_comfyui()


@pytest.fixture(scope="module")
def folder(comfyui, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    finished = subprocess.run(
        [sys.executable, WORKER, comfyui, folder], input=json.dumps(MODELS), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    yield folder
    for file in folder.glob("*/*.safetensors"):  # 600 MB that pytest would keep for three runs
        file.unlink()


@pytest.fixture(params=MODELS)
def family(request) -> str:
    return request.param


@pytest.fixture
def checkpoint(folder, comfyui, family):
    tokenizer_folder = comfyui / "comfy" / "sd1_tokenizer"
    return load_checkpoint(folder / family / "checkpoint.safetensors", tokenizer_folder=tokenizer_folder)


@pytest.fixture
def theirs(folder, family):
    return load_file(folder / family / "outputs.safetensors")


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_family_and_noise_are_inferred_alike(checkpoint, theirs, family):
    assert checkpoint.family == family
    if "sigmas" in theirs:
        sigmas = checkpoint.make_denoiser(None).sigmas(torch.arange(1000))
        torch.testing.assert_close(sigmas, theirs["sigmas"], rtol=1e-5, atol=0)
        return
    assert (checkpoint.prediction_type == "v_prediction") == bool(theirs["predicts_velocity"])
    torch.testing.assert_close(checkpoint.noise.alphas_cumprod, theirs["alphas_cumprod"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_unet_predicts_alike(checkpoint, theirs):
    inputs = {key: theirs[f"unet.{key}"] for key in ("hidden_states", "pooled") if f"unet.{key}" in theirs}
    denoiser = checkpoint.make_denoiser(checkpoint.load_model())
    predicted = denoiser.predict(theirs["unet.noisy"], theirs["unet.timesteps"].long(), inputs)
    assert_equal(predicted, theirs["unet.predicted"])


def test_prompts_are_encoded_alike(checkpoint, theirs):
    conditions = checkpoint.load_text_encoder().encode_prompts(PROMPTS)
    assert_equal(conditions["hidden_states"], theirs["text.hidden_states"])
    if "pooled" in conditions:
        assert_equal(conditions["pooled"], theirs["text.pooled"])


@pytest.mark.parametrize("family", FILE_KEYS, indirect=True)
def test_a_soft_prompt_acts_as_the_embedding_that_its_file_is(checkpoint, theirs, folder, family):
    """Both vectors stand behind the words; ComfyUI reads them from a file of the keys that ours are saved under."""
    vectors = load_file(folder / family / "soft.safetensors")
    encoded = []
    for tower, key in zip(checkpoint.load_text_encoder().towers, FILE_KEYS[family], strict=True):
        soft = SoftPromptTower(tower, 2, "circle")
        soft.vectors.data = vectors[key]
        encoded.append(soft.encode(soft.tokens(PROMPTS[1:])))
    assert_equal(torch.cat([hidden for hidden, _ in encoded], dim=-1), theirs["soft.hidden_states"])
    if encoded[-1][1] is not None:
        assert_equal(encoded[-1][1], theirs["soft.pooled"])
    assert (theirs["soft.hidden_states"] - theirs["text.hidden_states"][1:]).abs().max() > 0.1


def test_images_are_encoded_and_decoded_alike(checkpoint, theirs):
    vae = checkpoint.load_vae()
    assert_equal(vae.encode_images(theirs["vae.images"]), theirs["vae.latents"])
    assert_equal(vae.decode_latents(theirs["vae.latents"]), theirs["vae.decoded"])
