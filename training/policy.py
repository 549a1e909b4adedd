"""The model in training, which is its own reference: one interface over a diffusers model and ComfyUI's own."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ..experts.expert import Expert, LoraLayer
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Denoiser
from .lora import adapter_off, lora_parameters, read_layers
from .recipe import Recipe


class Policy(Protocol):
    """A model with a LoRA that starts as the identity, in its place on a device.

    Attributes:
        denoiser: noises, predicts and draws with the LoRA, and inside `reference` without it.
        parameters: what is trained, by name.
    """

    denoiser: Denoiser
    parameters: dict[str, nn.Parameter]

    def reference(self) -> contextlib.AbstractContextManager:
        """Inside, the denoiser predicts what the base model predicts."""

    def read_layers(self) -> dict[str, LoraLayer]:
        """Return the LoRA as expert layers (float32 copies on the CPU) by kohya module name."""

    def close(self) -> None:
        """Leave the model; called once, whatever happened."""


# checkpoint, recipe, experts that are part of the model, device, compute dtype
PolicyLoader = Callable[[Checkpoint, Recipe, Sequence[Expert], torch.device, torch.dtype], Policy]


class LoraPolicy:
    """A diffusers model that carries a LoRA (see lora.attach_lora).

    Args:
        denoiser: of the model.
        alpha: of the LoRA.
        parameters: what to train by name, where that is not the LoRA's own weights.
    """

    def __init__(self, denoiser: Denoiser, alpha: float, parameters: Mapping[str, nn.Parameter] | None = None):
        self.denoiser, self.alpha, self.model = denoiser, alpha, denoiser.model
        self.parameters: dict[str, nn.Parameter] = dict(
            lora_parameters(self.model) if parameters is None else parameters
        )

    def reference(self) -> contextlib.AbstractContextManager:
        return adapter_off(self.model)

    def read_layers(self) -> dict[str, LoraLayer]:
        return read_layers(self.model, self.alpha)

    def close(self) -> None:
        pass
