"""Core's LoRA training on a tiny FLUX.1: gradients under its checkpointing against those of the model itself.

    COMFYUI_PATH=<ComfyUI> python benchmarks/comfyui_flux_gradients.py [--out FILE]

Needs ComfyUI alone. See docs/comfyui_flux_gradients.md.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

ROOT = os.environ.get("COMFYUI_PATH")
if not ROOT:
    raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
sys.path.insert(0, ROOT)
ARGUMENTS, sys.argv = sys.argv[1:], ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.weight_adapter  # noqa: E402
import torch  # noqa: E402
from comfy.weight_adapter.bypass import BypassInjectionManager  # noqa: E402
from comfy_extras.nodes_train import find_modules_at_depth, patch, unpatch  # noqa: E402
from comfyui_version import __version__ as comfyui_version  # noqa: E402

CONFIG = {
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
    "dtype": torch.float32,
}


CONFIG_2 = CONFIG | {
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
FAMILIES = {
    "FLUX.1": (comfy.supported_models.Flux, comfy.model_base.Flux, CONFIG),
    "FLUX.2": (comfy.supported_models.Flux2, comfy.model_base.Flux2, CONFIG_2),
}


def build(family: str) -> tuple[torch.nn.Module, dict]:
    """Return the model with core's adapters injected, and the adapters by module name."""
    torch.manual_seed(0)
    supported, base, values = FAMILIES[family]
    config = supported(dict(values))
    config.set_inference_dtype(torch.float32, None)
    model = base(config, device="cpu")
    for name, parameter in model.diffusion_model.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.requires_grad_(False)
    manager, adapters = BypassInjectionManager(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(word in name for word in ("attn", "linear1", "linear2")):
            adapter = comfy.weight_adapter.adapter_maps["LoRA"].create_train(module.weight, rank=4, alpha=4.0)
            adapter.requires_grad_(True).alpha.requires_grad_(False)
            torch.nn.init.normal_(adapter.lora_up.weight, std=0.05)
            adapters[name] = adapter
            manager.add_adapter(f"{name}.weight", adapter)
    for injection in manager.create_injections(model):
        injection.inject(None)
    return model, adapters


def gradient(family: str, depth: int | None) -> torch.Tensor:
    """Return the gradient under core's checkpointing at `depth`, or, for None, of the model itself."""
    model, adapters = build(family)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    noisy, sigma = draw(2, 16, 16, 16).requires_grad_(True), torch.tensor([0.3, 0.6])
    given = {"c_crossattn": draw(2, 7, 32)}
    if family == "FLUX.1":
        given |= {"y": draw(2, 32), "guidance": torch.tensor([3.5, 3.5])}
    modules = find_modules_at_depth(model.diffusion_model, depth=depth) if depth else []
    for module in modules:
        patch(module)
    exact = torch.autograd.graph.allow_mutation_on_saved_tensors() if depth is None else contextlib.nullcontext()
    comfy.model_management.in_training = True
    try:
        with exact:
            model.apply_model(noisy, sigma, **given).square().mean().backward()
    finally:
        comfy.model_management.in_training = False
        for module in modules:
            unpatch(module)
    parts = [adapter.lora_down.weight.grad for adapter in adapters.values()]
    return torch.cat([part.flatten() for part in parts if part is not None])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(ARGUMENTS)
    report = {"comfyui": comfyui_version, "torch": torch.__version__}
    report |= {family: compare(family) for family in FAMILIES}
    print(json.dumps(report, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def compare(family: str) -> dict:
    """Return, for each depth of core's checkpointing, how far its gradient is from the model's."""
    truth, found = gradient(family, None), {}
    for depth in (0, 1, 2, 3):
        try:
            theirs = gradient(family, depth)
            found[f"depth {depth}" if depth else "no checkpointing"] = {
                "relative_error": float((theirs - truth).norm() / truth.norm()),
                "cosine": float(torch.nn.functional.cosine_similarity(theirs, truth, dim=0)),
            }
        except Exception as error:
            found[f"depth {depth}" if depth else "no checkpointing"] = {
                "raises": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            }
    return found


if __name__ == "__main__":
    raise SystemExit(main())
