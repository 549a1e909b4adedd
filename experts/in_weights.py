"""Experts added to the weights of a loaded model: what a LoRA computes, without a LoRA layer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .expert import Expert
from .keys import kohya_name


def add_to_weights(model: nn.Module, expert: Expert, strength: float = 1.0) -> None:
    """Add an expert to the weights of a UNet or transformer, in their precision: then it is part of the model.

    Raises:
        InputError: it has a layer, such as one of the text encoder, that the UNet has not in this shape.
    """
    modules = {kohya_name(path): module for path, module in model.named_modules()}
    _add(modules, expert, strength, "UNet", "give an expert of this model that changes its UNet only")


@contextlib.contextmanager
def weights_with(
    model: nn.Module, text_models: Sequence[nn.Module], experts: Sequence[tuple[Expert, float]]
) -> Iterator[None]:
    """Inside, a model and its CLIP text encoders carry experts; afterwards their weights are the very tensors before.

    Args:
        text_models: in the checkpoint's order; a LoRA calls them lora_te, or lora_te1 and lora_te2.
        experts: each with its strength.

    Raises:
        InputError: an expert has a layer that the model has not in this shape.
    """
    modules = {kohya_name(path): module for path, module in model.named_modules()}
    for number, text_model in enumerate(text_models):
        for path, module in text_model.named_modules():
            path = path if path.startswith("text_") else f"text_model.{path}"  # transformers 5 dropped it
            prefixes = (f"lora_te{number + 1}", *(("lora_te",) if number == 0 else ()))
            modules |= {kohya_name(path, prefix): module for prefix in prefixes}
    before: dict[nn.Parameter, Tensor] = {}
    try:
        for expert, strength in experts:
            remember = before.setdefault
            _add(modules, expert, strength, "model", "give an expert of this model", remember)
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data = weight


def _add(
    modules: Mapping[str, Any],
    expert: Expert,
    strength: float,
    what: str,
    remedy: str,
    remember: Callable[[nn.Parameter, Tensor], Any] = lambda *_: None,
) -> None:
    for name, layer in expert.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or tuple(weight.shape) != layer.weight_shape:
            found = f"which the {what} has not" if weight is None else f"where the {what} has {list(weight.shape)}"
            raise InputError(
                f"{expert.name} cannot be part of this model: layer {name} is {list(layer.weight_shape)}, "
                f"{found}; {remedy}"
            )
        remember(weight, weight.data)
        change = strength * layer.delta().to(weight.device)
        weight.data = (weight.data.float() + change).to(weight.dtype)
