"""A LoRA out of a fully fine-tuned model: the tuned UNet minus its base, layer by layer, at a low rank."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..tensor_file import TensorFile
from .expert import Expert, LoraLayer
from .info import ExpertInfo, Extracted
from .keys import layer_name
from .truncation import check_truncation, truncate_dense

logger = logging.getLogger(__name__)

_FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def extract_expert(
    tuned_path: str | os.PathLike,
    base_path: str | os.PathLike,
    *,
    rank: int = 32,
    energy: float = 1.0,
    categories: Sequence[str] = (),
    name: str = "extracted",
    device: torch.device | str | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Expert:
    """Return tuned - base of every linear and convolution weight of the UNet as a LoRA.

    Norms and biases cannot be in a LoRA and are left out; their number is in the info. Native names are translated for
    models with two residual blocks a level (SD1.x, SD2.x, SDXL).

    Args:
        tuned_path, base_path: single-file checkpoint, UNet file, or diffusers folder; spellings may differ.
        rank: largest rank of a layer.
        energy: keep no more ranks than hold this fraction of a layer's squared change.
        categories: what the tuned model is safer in.
        device: where to compute; the result is on the CPU.
        on_layer: called with (layers done, layers in all).

    Raises:
        InputError: a file cannot be read, the models differ in shape, or the tuned one is no different.
    """
    check_truncation(rank, energy)
    layers: dict[str, LoraLayer] = {}
    retained, num_left_out = {}, 0
    tuned, tuned_keys = _open_weights(tuned_path)
    base, base_keys = _open_weights(base_path)
    names = [name for name in tuned_keys if name in base_keys]
    if not names:
        raise InputError(f"{tuned_path} and {base_path} have no UNet layer in common; are both of one family?")
    for done, layer in enumerate(names, start=1):
        after, before = tuned[tuned_keys[layer]], base[base_keys[layer]]
        if _matrix_shape(after) != _matrix_shape(before):
            raise InputError(
                f"layer {layer} is {list(after.shape)} in {tuned_path} but {list(before.shape)} in {base_path}; "
                "give the base that the model was tuned from"
            )
        delta = after.to(device).float() - before.to(device).float().reshape(after.shape)
        if after.ndim < 2:
            num_left_out += bool(delta.any())
        elif truncated := truncate_dense(delta.flatten(1), rank, energy):
            layers[layer] = LoraLayer.from_matrices(truncated.up.cpu(), truncated.down.cpu(), before.shape)
            retained[layer] = round(truncated.retained_energy, 6)
        if on_layer:
            on_layer(done, len(names))
    if not layers:
        raise InputError(f"{tuned_path} has the same UNet weights as {base_path}; give the fine-tuned model first")
    if num_left_out:
        logger.warning("%s: %d changed norms cannot be in a LoRA and are left out", tuned_path, num_left_out)
    origin = Extracted(
        tuned=Path(tuned_path).name,
        base=Path(base_path).name,
        rank=rank,
        energy=energy,
        retained_energy=retained,
        num_left_out=num_left_out,
    )
    return Expert(layers, ExpertInfo(categories=tuple(categories), origin=origin), name)


def _matrix_shape(weight: Tensor) -> list[int]:
    """Return a weight's shape without the ones at its end: a 1x1 convolution is a linear layer."""
    shape = list(weight.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape


def _open_weights(path: str | os.PathLike) -> tuple[TensorFile, dict[str, str]]:
    """Return an open safetensors file and, for each UNet layer by kohya name, the key of its weight."""
    file_path = Path(path)
    if file_path.is_dir():
        candidates = [folder / name for folder in (file_path / "unet", file_path) for name in _FOLDER_FILES]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise InputError(f"no {_FOLDER_FILES[0]} in {path} or its unet folder; give a diffusers folder or a file")
        file_path = found[0]
    file, keys = TensorFile(file_path), {}
    for key in file:
        layer = layer_name(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if layer and layer.startswith("lora_unet_"):
            keys[layer] = key
    return file, keys
