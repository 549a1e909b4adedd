"""The trainable LoRA on a ComfyUI model: which layers, what it computes, how it is called in a file."""

import re
from collections.abc import Iterator
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassForwardHook
from torch import Tensor, nn
from torch.nn import functional

from ...errors import InputError
from ...experts.expert import LoraLayer
from ...seeding import seeded_generator
from ...training.recipe import Recipe

MODEL_PREFIX = "diffusion_model."
_ATTENTION = re.compile(r"(^|[._])(\w*attn\w*|attention\w*)[._]")
_SELF, _CROSS = re.compile(r"self_attn|attn1|attention"), re.compile(r"cross_attn|attn2")
# FLUX and its kin compute attention and the MLP of a single block in two layers.
_SINGLE_BLOCK = re.compile(r"single_blocks\.\d+\.linear[12]$")
_NO_ATTENTION = re.compile(r"norm|modulation|adaln|mlp|\.ff\.", re.IGNORECASE)
_DIFFUSERS_UNET = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_")


class LoraAdapter(WeightAdapterTrainBase):
    """alpha / rank · up @ down beside a linear layer, float32; computed in the type of what comes in.

    Attributes:
        multiplier: 1: policy, 0: reference, whose output is the layer's own to the last bit.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.alpha, self.multiplier = alpha, 1.0

    def bypass_forward(self, original, x: Tensor, *args, **kwargs) -> Tensor:
        base = original(x, *args, **kwargs)
        if not self.multiplier:
            return base
        hidden = functional.linear(x, self.down.to(x.dtype))
        scale = self.alpha / len(self.down) * self.multiplier
        return base + functional.linear(hidden, self.up.to(x.dtype)) * scale

    def layer(self) -> LoraLayer:
        """Return a float32 copy on the CPU."""
        return LoraLayer(
            down=self.down.detach().float().cpu().clone(), up=self.up.detach().float().cpu().clone(), alpha=self.alpha
        )


class Adapters:
    """A fresh LoRA for the attention layers of a model's blocks; `inject` and `eject` put it on and off.

    A is normal with standard deviation 1/rank, B zero; drawn on the CPU from the recipe's seed. For SD1.x and SDXL in
    the order of the path by checkpoint, so that both paths start from the same numbers.

    Args:
        model: ComfyUI's BaseModel.

    Attributes:
        by_name: the adapters by kohya name, `lora_unet_…`.

    Raises:
        InputError: the model has no layers of the recipe's `targets`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device):
        names = kohya_names(model)
        found: dict[str, Any] = {
            names[path]: module for path, module in target_layers(model, recipe.targets) if path in names
        }
        if not found:
            raise InputError(f"this model has no {recipe.targets} layers to train; set targets to attention")
        generator = seeded_generator(recipe.seed, "lora")
        self.by_name: dict[str, LoraAdapter] = {}
        self._hooks = []
        for name in sorted(found, key=_diffusers_order) if _is_unet(found) else found:
            module = found[name]
            down = torch.randn(recipe.rank, module.in_features, generator=generator) / recipe.rank
            up = torch.zeros(module.out_features, recipe.rank)
            adapter = LoraAdapter(down.to(device), up.to(device), recipe.lora_alpha)
            self.by_name[name] = adapter
            self._hooks.append(BypassForwardHook(module, adapter))

    def inject(self) -> None:
        for hook in self._hooks:
            hook.inject()

    def eject(self) -> None:
        for hook in self._hooks:
            hook.eject()

    def set_multiplier(self, value: float) -> None:
        for adapter in self.by_name.values():
            adapter.multiplier = value

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return `<kohya name>.down` [r, d_in] and `.up` [d_out, r] of every layer."""
        parameters = {}
        for name, adapter in self.by_name.items():
            parameters[f"{name}.down"], parameters[f"{name}.up"] = adapter.down, adapter.up
        return parameters


def target_layers(model: nn.Module, targets: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the attention's linear layers in the outermost blocks, in module order.

    Args:
        targets: "attention", "self-attention" or "cross-attention", as in a recipe.
    """
    for path, module in model.named_modules():
        if not path.startswith(MODEL_PREFIX) or not _is_linear(module):
            continue
        inner = path.removeprefix(MODEL_PREFIX)
        in_block = re.search(r"\.\d+\.", inner) or inner.startswith("middle_block")
        is_attention = _SINGLE_BLOCK.search(inner) or (_ATTENTION.search(inner) and not _NO_ATTENTION.search(inner))
        wanted = {"attention": True, "self-attention": _SELF.search(inner), "cross-attention": _CROSS.search(inner)}
        if in_block and is_attention and wanted[targets]:
            yield path, module


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        hasattr(module, "weight_function") and hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def kohya_names(model: nn.Module) -> dict[str, str]:
    """Return module path -> kohya name by core's own table: `lora_unet_<path>`, diffusers' for SD1.x and SDXL."""
    names: dict[str, str] = {}
    for name, key in comfy.lora.model_lora_keys_unet(model, {}).items():
        if not isinstance(key, str) or not name.startswith("lora_unet_") or not key.endswith(".weight"):
            continue
        path = key.removesuffix(".weight")
        if path not in names or _DIFFUSERS_UNET.match(name):
            names[path] = name
    return names


def _is_unet(names) -> bool:
    return all(_DIFFUSERS_UNET.match(name) for name in names)


def _diffusers_order(name: str) -> tuple:
    """Sort as the modules of a diffusers UNet: down, up, middle; to_q, to_k, to_v, to_out."""
    section = ("down", "up", "mid").index(name.removeprefix("lora_unet_").split("_")[0])
    layer = ("q", "k", "v", "out").index(re.findall(r"to_(q|k|v|out)", name)[0])
    return (section, *map(int, re.findall(r"\d+", name.removesuffix("_0"))), layer)
