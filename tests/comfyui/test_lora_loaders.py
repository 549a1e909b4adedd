"""What every merge method saves loads in the stock ComfyUI loader and in diffusers, whole, and is the same ΔW there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name, layer_name
from safety_experts.experts.merging import METHODS, merge_experts
from safety_experts.models.checkpoint import load_checkpoint

WORKER = Path(__file__).with_name("comfyui_loras.py")
BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
# One of each kind of layer of the toy model, which has SD1.5's shapes, and of SDXL.
SD15 = {
    f"lora_unet_{BLOCK}_attn1_to_q": (320, 320),
    f"lora_unet_{BLOCK}_attn1_to_out_0": (320, 320),
    f"lora_unet_{BLOCK}_attn2_to_k": (320, 768),
    f"lora_unet_{BLOCK}_ff_net_2": (320, 1280),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
    "lora_unet_conv_in": (320, 4, 3, 3),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "lora_te_text_model_encoder_layers_0_self_attn_out_proj": (768, 768),  # diffusers knows the format by this one
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
SDXL_BLOCK = "down_blocks_1_attentions_0_transformer_blocks_1"
SDXL = {
    f"lora_unet_{SDXL_BLOCK}_attn1_to_q": (640, 640),
    f"lora_unet_{SDXL_BLOCK}_attn2_to_v": (640, 2048),
    "lora_unet_mid_block_attentions_0_proj_in": (1280, 1280),
    "lora_unet_up_blocks_2_resnets_0_conv1": (320, 960, 3, 3),
    "lora_unet_down_blocks_0_downsamplers_0_conv": (320, 320, 3, 3),
    "lora_unet_add_embedding_linear_1": (1280, 2816),
    "lora_unet_add_embedding_linear_2": (1280, 1280),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LINEAR, CONVOLUTION = f"lora_unet_{BLOCK}_attn2_to_k", "lora_unet_conv_in"
LYCORIS = {
    "loha": {
        f"{LINEAR}.hada_w1_a": random(320, 4),
        f"{LINEAR}.hada_w1_b": random(4, 768),
        f"{LINEAR}.hada_w2_a": random(320, 4) + 0.5,
        f"{LINEAR}.hada_w2_b": random(4, 768) + 0.5,
        f"{LINEAR}.alpha": torch.tensor(2.0),
        f"{CONVOLUTION}.hada_t1": random(3, 3, 3, 3),
        f"{CONVOLUTION}.hada_w1_a": random(3, 320),
        f"{CONVOLUTION}.hada_w1_b": random(3, 4),
        f"{CONVOLUTION}.hada_t2": random(3, 3, 3, 3) + 0.5,
        f"{CONVOLUTION}.hada_w2_a": random(3, 320) + 0.5,
        f"{CONVOLUTION}.hada_w2_b": random(3, 4) + 0.5,
        f"{CONVOLUTION}.alpha": torch.tensor(1.5),
    },
    "lokr": {
        f"{LINEAR}.lokr_w1": random(16, 32),
        f"{LINEAR}.lokr_w2_a": random(20, 3),
        f"{LINEAR}.lokr_w2_b": random(3, 24),
        f"{LINEAR}.alpha": torch.tensor(6.0),
        f"{CONVOLUTION}.lokr_w1": random(16, 2),
        f"{CONVOLUTION}.lokr_w2": random(20, 2, 3, 3),
        f"{CONVOLUTION}.alpha": torch.tensor(1.0),
    },
}


def make_expert(seed: int, rank: int, alpha: float, category: str, shapes: dict) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (out, *inner) in shapes.items():
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
        layers[name] = LoraLayer(down, up, alpha)
    return Expert(layers, ExpertInfo(categories=[category]), category)


def merge(method: str, shapes: dict) -> Expert:
    experts = [make_expert(1, 3, 2.0, "hate", shapes), make_expert(2, 2, 2.0, "violence", shapes)]
    generator = torch.Generator().manual_seed(3)
    counts = {name: torch.randint(1, 99, (2, shape[0]), generator=generator) for name, shape in shapes.items()}
    return merge_experts(experts, method, weights=[1.0, 0.6], activation_counts=counts)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return load_checkpoint(ensure_toy_checkpoint()).load_model()


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory) -> Path:
    """A file of every method, one that has every layer of the UNet, and one for SDXL."""
    folder = tmp_path_factory.mktemp("loras")
    for method in METHODS:
        save_expert(merge(method, SD15), folder / f"{method}.safetensors")
    every_layer = {
        kohya_name(path): tuple(module.weight.shape)
        for path, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    save_expert(merge("linear", every_layer), folder / "every_layer.safetensors")
    save_expert(merge("co-merge", SDXL), folder / "sdxl.safetensors")
    for kind, tensors in LYCORIS.items():
        save_file(tensors, folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="module")
def comfyui_changes(folder, tmp_path_factory) -> tuple[dict, list[str]]:
    """What stock ComfyUI loads: file/layer -> ΔW @ probe; and all it warned about."""
    out = tmp_path_factory.mktemp("changes") / "out.safetensors"
    command = [sys.executable, WORKER, find_comfyui(), ensure_toy_checkpoint(), folder, out]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with safe_open(out, "pt") as file:
        return load_file(out), json.loads(file.metadata()["warnings"])


FILES = [*METHODS, "every_layer", "sdxl"]


def assert_equal(found: dict, expert: Expert) -> None:
    assert found.keys() == expert.layers.keys()
    for name, layer in expert.layers.items():
        width = layer.down[0].numel()
        probe = torch.randn(width, 2, generator=torch.Generator().manual_seed(width))
        expected = layer.delta().flatten(1) @ probe
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("name", FILES)
def test_stock_comfyui_loads_every_key_and_the_same_change(folder, comfyui_changes, name):
    changes, warnings = comfyui_changes
    found = {key.partition("/")[2]: value for key, value in changes.items() if key.startswith(f"{name}/")}

    assert_equal(
        {layer_name(name): value for name, value in found.items()}, load_expert(folder / f"{name}.safetensors")
    )
    assert warnings == []


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_converted_file_is_the_change_that_comfyui_makes_of_the_original(folder, comfyui_changes, kind):
    changes, _ = comfyui_changes
    found = {key.partition("/")[2]: value for key, value in changes.items() if key.startswith(f"{kind}/")}
    out = folder / "converted" / f"{kind}.safetensors"

    assert run(["convert", str(folder / f"{kind}.safetensors"), "--out", str(out), "--rank", "1000"]) == 0
    assert_equal(found, load_expert(out))


@pytest.fixture(scope="module")
def pipelines(unet):
    """Diffusers pipelines by family; SDXL's UNet has its real shapes, fewer transformer blocks and no weights."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        sdxl_unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 1),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    sdxl_unet.to_empty(device="cpu")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=8, hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=12
        )
    )
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    common = {"vae": None, "tokenizer": None, "scheduler": scheduler, "feature_extractor": None}
    sd15 = StableDiffusionPipeline(
        unet=unet, text_encoder=text_encoder, safety_checker=None, requires_safety_checker=False, **common
    )
    sdxl = StableDiffusionXLPipeline(
        unet=sdxl_unet, text_encoder=None, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **common
    )
    return {"sd15": sd15, "sdxl": sdxl}


@pytest.mark.parametrize("name", FILES)
def test_diffusers_loads_every_key_and_the_same_change(folder, pipelines, name, caplog):
    pipeline = pipelines["sdxl" if name == "sdxl" else "sd15"]
    adapter = name.replace("-", "_")

    pipeline.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=adapter)

    found = {}
    for component, prefix in ((pipeline.unet, "lora_unet"), (pipeline.text_encoder, "lora_te")):
        for path, module in component.named_modules() if component else ():
            if adapter in getattr(module, "lora_A", {}):
                change = module.get_delta_weight(adapter).detach().flatten(1)
                width = change.shape[1]
                probe = torch.randn(width, 2, generator=torch.Generator().manual_seed(width))
                if prefix == "lora_te" and not path.startswith("text_model."):  # transformers 5 has no such level
                    path = f"text_model.{path}"
                found[kohya_name(path, prefix)] = change @ probe
    pipeline.delete_adapters(adapter)
    assert_equal(found, load_expert(folder / f"{name}.safetensors"))
    assert not [message for message in caplog.messages if "unexpected keys" in message]
