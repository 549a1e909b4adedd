"""Experts of SD3 and FLUX in the stock loader: no key is ignored, and ComfyUI then predicts what the trainer does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_checkpoints as small
import small_flow_checkpoints as flow
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.experts.expert import Expert
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.training.lora import adapter_off, attach_lora, lora_parameters, read_layers
from safety_experts.training.recipe import Recipe

WORKER = Path(__file__).with_name("comfyui_flow_loras.py")
TIMESTEPS = torch.tensor([3, 777])
SHAPES = {"sd3": flow.sd3_shapes(), "sd35": flow.sd3_shapes(is_sd35=True), "flux": flow.flux_shapes()}


def denoiser_with_expert(path, seed=0):
    """Attach a LoRA of random numbers, as if trained."""
    checkpoint = load_checkpoint(path)
    denoiser = checkpoint.make_denoiser(checkpoint.load_model())
    recipe = Recipe(rank=3, alpha=6.0, seed=seed)
    attach_lora(denoiser.model, recipe)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(denoiser.model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return denoiser, Expert(read_layers(denoiser.model, recipe.lora_alpha), ExpertInfo(), "expert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the trainer predicts with an expert (`ours`) and without (`base`), and ComfyUI with the expert's file."""
    folder = tmp_path_factory.mktemp("flow")
    for name, shapes in SHAPES.items():
        path = small.write(folder / f"{name}.safetensors", small.random_weights(shapes))
        denoiser, expert = denoiser_with_expert(path)
        # A merge's file, in which a second expert was added and taken away again.
        other = denoiser_with_expert(path, seed=1)[1]
        merged = merge_experts([expert, other, other], "linear", weights=[1.0, 1.0, -1.0])
        save_expert(merged, folder / f"{name}_expert.safetensors")
        generator = torch.Generator().manual_seed(0)
        kind = "flux" if name == "flux" else "sd3"
        inputs = {
            "noisy": torch.randn(2, 16, 6, 8, generator=generator),
            "hidden_states": torch.randn(2, 20, flow.T5_WIDTH[kind], generator=generator),
            "pooled": torch.randn(2, flow.POOLED_WIDTH[kind], generator=generator),
        }
        save_file(inputs | {"sigmas": denoiser.sigmas(TIMESTEPS)}, folder / f"{name}_inputs.safetensors")
        with torch.no_grad():
            ours = denoiser.predict(inputs["noisy"], TIMESTEPS, inputs)
            with adapter_off(denoiser.model):
                base = denoiser.predict(inputs["noisy"], TIMESTEPS, inputs)
        save_file({"ours": ours.contiguous(), "base": base.contiguous()}, folder / f"{name}_ours.safetensors")
    done = subprocess.run([sys.executable, WORKER, find_comfyui(), folder, *SHAPES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_stock_comfyui_applies_the_whole_expert(folder, name):
    with safe_open(folder / f"{name}_predicted.safetensors", "pt") as file:
        predicted, metadata = file.get_tensor("predicted"), file.metadata()
    assert [text for text in json.loads(metadata["warnings"]) if "lora" in text.lower()] == []
    assert metadata["dtype"] == "torch.float32"
    expected = load_file(folder / f"{name}_ours.safetensors")
    assert (expected["ours"] - expected["base"]).std() > 0.05
    torch.testing.assert_close(predicted, expected["ours"], rtol=1e-4, atol=1e-4)
    assert all(key.startswith("lora_transformer_") for key in load_expert(folder / f"{name}_expert.safetensors").layers)
