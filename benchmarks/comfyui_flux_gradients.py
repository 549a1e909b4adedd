"""Core's LoRA training on a tiny FLUX.1: gradients under its checkpointing against those of the model itself.

    COMFYUI_PATH=<ComfyUI> python benchmarks/comfyui_flux_gradients.py [--out FILE]

Needs ComfyUI alone, and family_cases.py beside it. See docs/comfyui_flux_gradients.md.
"""

import argparse
import contextlib
import json
from pathlib import Path

from family_cases import ARGUMENTS, CASES, random_model  # it sets ComfyUI up

# isort: split
import comfy.model_management
import comfy.weight_adapter
import torch
from comfy.weight_adapter.bypass import BypassInjectionManager
from comfy_extras.nodes_train import find_modules_at_depth, patch, unpatch
from comfyui_version import __version__ as comfyui_version

FAMILIES = {"FLUX.1": "flux1", "FLUX.2": "flux2-klein"}


def build(family: str) -> tuple[torch.nn.Module, dict]:
    """Return the model with core's adapters injected, and the adapters by module name."""
    model = random_model(CASES[FAMILIES[family]], torch.float32)
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
