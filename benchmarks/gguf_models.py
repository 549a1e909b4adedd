"""Train through the layers of ComfyUI-GGUF: gradients of packed models against those of the same numbers unpacked.

    COMFYUI_PATH=<ComfyUI> GGUF_PACK=<ComfyUI-GGUF> python benchmarks/gguf_models.py

Needs the pack (github.com/city96/ComfyUI-GGUF) and its `gguf` package (PyPI). The tiny random families of
benchmarks/family_cases.py, packed in four types, with a LoRA on one layer as a de-distill adapter would lie there.
Exit 1 where a gradient is off.
"""

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

import families
import torch
from families import ARGUMENTS, CASES, CPU, ModelPatcher
from safety_experts.evaluation.machine import describe_machine
from safety_experts.nodes.native.adapters import target_layers
from torch import Tensor, nn

PACK = Path(os.environ["GGUF_PACK"])
RESULT = Path(__file__).resolve().parent / "results" / "gguf_models.json"
NAMES = ARGUMENTS or ["sd15", "sd3", "flux1", "flux2-klein", "chroma", "z-image", "qwen-image", "wan2.2", "hidream-i1"]
KINDS = ("BF16", "Q8_0", "Q5_1", "Q4_0")


def import_pack() -> None:
    """Import the pack as ComfyUI does."""
    folders = [str(PACK)]
    spec = importlib.util.spec_from_file_location("gguf_pack", PACK / "__init__.py", submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_pack"] = module
    spec.loader.exec_module(module)


import_pack()
from gguf import GGMLQuantizationType, quants  # noqa: E402
from gguf_pack.dequant import dequantize_tensor  # noqa: E402
from gguf_pack.nodes import GGUFModelPatcher  # noqa: E402
from gguf_pack.ops import GGMLOps, GGMLTensor  # noqa: E402


def pack(value: Tensor, kind: GGMLQuantizationType | None) -> GGMLTensor:
    """Return a weight as the pack's loader gives it, float32 without a kind."""
    if kind is None:
        return GGMLTensor(value.clone(), tensor_type=GGMLQuantizationType.F32, tensor_shape=value.shape)
    packed = torch.from_numpy(quants.quantize(value.numpy(), kind))
    return GGMLTensor(packed, tensor_type=kind, tensor_shape=value.shape)


def is_packed(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % 32 == 0


def with_lora(patcher: ModelPatcher) -> ModelPatcher:
    path, layer = next(target_layers(patcher.model, "attention"))
    change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(4)) * 0.01
    patcher.add_patches({f"{path}.weight": ("diff", (change,))})
    return patcher


def both(name: str, kind: GGMLQuantizationType) -> tuple[ModelPatcher, ModelPatcher]:
    """Return a family packed, and with the same numbers in float32."""
    case = CASES[name]
    plain = families.build(case, torch.float32)
    with torch.inference_mode():
        inner = plain.model.diffusion_model
        packed = {f"{path}.weight" for path, module in inner.named_modules() if is_packed(module)}
        weights = {key: pack(value, kind if key in packed else None) for key, value in inner.state_dict().items()}
        config = case.config({**case.unet, "dtype": torch.float32})
        config.set_inference_dtype(torch.float32, None)
        config.custom_operations = GGMLOps
        model = case.base(config, device="cpu").eval()
        model.diffusion_model.load_state_dict(weights)
        unpacked = {key: dequantize_tensor(value, torch.float32).as_subclass(Tensor) for key, value in weights.items()}
        inner.load_state_dict(unpacked)
    return with_lora(GGUFModelPatcher(model, load_device=CPU, offload_device=CPU)), with_lora(plain)


def gradient_error(name: str, kind: GGMLQuantizationType) -> float:
    found = []
    for patcher in both(name, kind):
        policy, batch, bare, reference = families.open_policy(CASES[name], torch.float32, patcher)
        if not torch.equal(bare, reference):
            raise ValueError("the reference is not the model without adapters")
        families.set_up_matrices(policy, torch.float32)
        found.append(families.gradient(policy, families.loss_of(policy, batch, reference)))
        policy.close()
    return float((found[0] - found[1]).norm() / found[1].norm())


def main() -> int:
    logging.disable(logging.WARNING)
    errors: dict[str, dict[str, float]] = {}
    for name in NAMES:
        errors[name] = {kind: gradient_error(name, GGMLQuantizationType[kind]) for kind in KINDS}
        print(f"{name:16} {json.dumps(errors[name])}", flush=True)
    if not ARGUMENTS:
        result = {"what": __doc__.splitlines()[0], **describe_machine(), "relative_gradient_error": errors}
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(error > 1e-5 for row in errors.values() for error in row.values()))


if __name__ == "__main__":
    sys.exit(main())
