"""The trainable LoRA on a UNet: attach it, switch it off for the reference, read it out as expert layers."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..experts.expert import LoraLayer
from ..experts.keys import kohya_name
from ..seeding import seeded_generator
from .lora_linear import lora_linear
from .recipe import Recipe

ADAPTER = "expert"
# SD3 and FLUX have one attention over image and text, `attn`, whose text side is `add_…`; SD3.5 has an `attn2` too.
_TARGETS = {
    "attention": r".*\.attn[12]?\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)",
    "self-attention": r".*\.attentions\..*\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "cross-attention": r".*\.attentions\..*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
}


def attach_lora(model: nn.Module, recipe: Recipe) -> None:
    """Freeze `model` and give its attention layers a float32 LoRA that starts as the identity.

    A is normal with standard deviation 1/rank (peft's "gaussian"), B zero; drawn on the CPU from the recipe's seed, so
    experts of one seed share their A.

    Raises:
        InputError: the model has no layers of the recipe's `targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model  # peft takes seconds to import

    if not any(re.fullmatch(_TARGETS[recipe.targets], name) for name, _ in model.named_modules()):
        raise InputError(f"this model has no {recipe.targets} layers to train; set targets to attention")
    model.requires_grad_(False)
    alpha: Any = recipe.lora_alpha  # peft's annotation says int; it computes with floats
    config = LoraConfig(r=recipe.rank, lora_alpha=alpha, target_modules=_TARGETS[recipe.targets])
    config._register_custom_module({nn.Linear: lora_linear()})
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    generator = seeded_generator(recipe.seed, "lora")
    for _, module in lora_modules(model):
        down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        initial = torch.randn(down.shape, generator=generator) / recipe.rank
        down.data = initial.to(down.device)
        up.data = torch.zeros(up.shape, device=up.device)


def lora_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (diffusers module path, peft layer) of every layer that carries the LoRA, in module order."""
    return [(name, module) for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", {})]


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name: `<module path>.down` [r, d_in] and `<module path>.up` [d_out, r]."""
    parameters = {}
    for name, module in lora_modules(model):
        parameters[f"{name}.down"] = module.lora_A[ADAPTER].weight
        parameters[f"{name}.up"] = module.lora_B[ADAPTER].weight
    return parameters


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the UNet computes what the base model computes: the reference of the preference objectives.

    Run the reference before the policy: peft freezes the LoRA while it is off.
    """
    layers = [module for _, module in lora_modules(model)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def read_layers(model: nn.Module, alpha: float) -> dict[str, LoraLayer]:
    """Return the LoRA as expert layers (float32 copies on the CPU), keyed by kohya module name."""
    return {
        kohya_name(name): LoraLayer(
            down=module.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            up=module.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            alpha=alpha,
        )
        for name, module in lora_modules(model)
    }
