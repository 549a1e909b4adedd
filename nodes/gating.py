"""LoRA layers that act only in a part of the sampling.

Weights cannot be patched and unpatched at every step without slowing the host down, so the low-rank change is added to
each layer's output instead, while a wrapper around the model opens and closes the gate by the current noise level.
"""

import itertools
from collections.abc import Mapping

import comfy.utils
import torch
from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..experts.expert import LoraLayer

_numbers = itertools.count()


class SigmaGate:
    """Open while the noise level is within [last_sigma, first_sigma], as ComfyUI's own timestep ranges count it."""

    def __init__(self, first_sigma: float, last_sigma: float):
        self.first_sigma, self.last_sigma = first_sigma, last_sigma
        self.is_open = False

    def __call__(self, executor, x: Tensor, sigma: Tensor, *arguments, **options):
        self.is_open = self.last_sigma <= float(sigma.max()) <= self.first_sigma
        return executor(x, sigma, *arguments, **options)


class GatedLayer:
    """A forward hook that adds a LoRA layer's contribution to a module's output while the gate is open."""

    def __init__(self, layer: LoraLayer, gate: SigmaGate):
        self._down, self._up, self._gate = layer.down, layer.up.float() * layer.scale, gate

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._gate.is_open:
            return output
        x = inputs[0]
        self._down, self._up = self._down.to(x), self._up.to(x)  # stays there for the next step
        if isinstance(module, nn.Conv2d):
            hidden = functional.conv2d(x, self._down, None, module.stride, module.padding, module.dilation)
            return output + functional.conv2d(hidden, self._up)
        return output + functional.linear(functional.linear(x, self._down), self._up)


def add_gated_layers(model, layers: Mapping[object, LoraLayer], start_percent: float, end_percent: float):
    """Return a clone of a ModelPatcher with LoRA layers that act between two points of the sampling.

    Any number of these stack, and they compose with weight patches, hooks and batched conditions.

    Args:
        layers: ComfyUI weight key -> layer; keys of the text encoder are left out.
        start_percent, end_percent: 0 is the beginning of the sampling, 1 its end.

    Raises:
        InputError: a layer changes a slice of a fused weight.
    """
    sampling = model.get_model_object("model_sampling")
    gate = SigmaGate(sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))
    hooks: dict[str, GatedLayer] = {}
    for key, layer in layers.items():
        if not isinstance(key, str):
            raise InputError("start_percent and end_percent do not work on this model family: leave them at 0 and 1")
        if key.startswith("diffusion_model."):
            hooks[key.removesuffix(".weight")] = GatedLayer(layer, gate)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def inject(patcher) -> None:
        for path, hook in hooks.items():
            handles.append(comfy.utils.get_attr(patcher.model, path).register_forward_hook(hook))

    def eject(patcher) -> None:
        while handles:
            handles.pop().remove()

    own_key = f"safety_experts_gate_{next(_numbers)}"  # under one fixed key a second expert would replace the first
    gated = model.clone()
    gated.set_injections(own_key, [PatcherInjection(inject=inject, eject=eject)])
    gated.add_wrapper_with_key(WrappersMP.APPLY_MODEL, own_key, gate)
    return gated
