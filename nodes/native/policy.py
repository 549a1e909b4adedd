"""A ComfyUI model that is trained beside itself as its own reference: the library's Policy over a ModelPatcher."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import nn

from ...errors import InputError
from ...experts.expert import LoraLayer
from ...training.recipe import Recipe
from . import packed, refusals
from .adapters import Adapters
from .denoiser import NativeDenoiser
from .room import room_bytes

logger = logging.getLogger(__name__)

INJECTION_KEY = "safety_experts_training"


class NativePolicy:
    """Adapters on core's bypass hooks; with multiplier 0 the model is its own reference, bit for bit.

    Patches that the MODEL came with (a de-distill adapter, a style, another expert) are in policy and reference, and
    not in what is read out.

    Args:
        model: the MODEL of the graph; not changed, but its weights become ordinary tensors (`leave_inference`).

    Raises:
        InputError: it cannot be trained on; the message says what to do instead.
    """

    def __init__(self, model, recipe: Recipe):
        refusals.check_model(model)
        self._patcher = _plain_clone(model, recipe)
        self._adapters = Adapters(self._patcher.model, recipe, self._patcher.load_device)
        self._patcher.set_injections(
            INJECTION_KEY,
            [
                comfy.patcher_extension.PatcherInjection(
                    inject=lambda patcher: self._adapters.inject(), eject=lambda patcher: self._adapters.eject()
                )
            ],
        )
        rows = recipe.batch_size * (3 if recipe.anchor_weight else 2)
        self._room_bytes = room_bytes(self._patcher, self._adapters, rows)
        self.load()
        self.denoiser = NativeDenoiser(self._patcher, recipe.gradient_checkpointing, recipe.flow_error)
        self.parameters: dict[str, nn.Parameter] = self._adapters.parameters()

    def load(self) -> None:
        """Bring the model to its device, if something else has taken its place since.

        What does not fit beside a step stays in RAM, as when ComfyUI draws: a layer's weights come when it computes,
        in the second pass of a checkpointed block too.
        """
        comfy.model_management.load_models_gpu([self._patcher], memory_required=self._room_bytes)
        if self._patcher.model.model_lowvram:
            logger.warning("the MODEL does not fit beside a training step: a part of it stays in RAM, which is slower")

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self._adapters.set_multiplier(0.0)
        try:
            yield
        finally:
            self._adapters.set_multiplier(1.0)

    def read_layers(self) -> dict[str, LoraLayer]:
        return {name: adapter.layer() for name, adapter in self._adapters.by_name.items()}

    def close(self) -> None:
        """Take the adapters off and unload: the MODEL of the graph is as it came."""
        comfy.model_management.unload_model_and_clones(self._patcher)
        self._adapters.eject()


def _plain_clone(model, recipe: Recipe):
    """Return a clone that owns nothing dynamic and whose weights autograd can save.

    Raises:
        InputError: the model moves its weights while it computes, and its loader cannot give it otherwise.
    """
    if model.is_dynamic():
        if model.cached_patcher_init is None:
            raise InputError(
                "this MODEL loads its weights while it computes (dynamic VRAM), which cannot be trained through, and "
                "its loader cannot load it otherwise: start ComfyUI with --disable-dynamic-vram, or use a stock loader"
            )
        clone = model.clone(disable_dynamic=True)
    else:
        clone = model.clone()
    comfy.model_management.unload_model_and_clones(model)
    refusals.drop_what_is_no_weight(clone)
    leave_inference(clone.model)
    clone.model.requires_grad_(False)
    if recipe.precision != "auto":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
        if clone.model.get_dtype_inference() != dtype:
            clone.set_model_compute_dtype(dtype)
    return clone


def leave_inference(model: nn.Module) -> None:
    """Replace weights that were made in inference mode, as loaders in a graph do: autograd refuses to save them.

    One at a time, so that no second copy of the model exists.
    """
    for module in model.modules():
        both: tuple[Any, Any] = (module._parameters, module._buffers)
        for tensors in both:
            for name, value in tensors.items():
                # GGUF's packed numbers meet autograd unpacked only, and stay in the file's own memory.
                if value is not None and value.is_inference() and value.is_floating_point():
                    plain = packed.ordinary(value.detach()).clone()
                    tensors[name] = nn.Parameter(plain, requires_grad=False) if tensors is module._parameters else plain
