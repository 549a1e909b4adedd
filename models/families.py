"""The families of base models that can be trained by checkpoint, and which of them a file or folder holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .family import Family, Layout
from .flux import Flux
from .sd3 import SD3
from .stable_diffusion import SD15, SD20, SDXL
from .unet_keys import infer_layout
from .weights_file import WeightsFile

FAMILIES: tuple[Family, ...] = (SD15(), SD20(), SDXL(), SD3(), Flux())
TRAINABLE = "an SD1.x, SD2.x, SDXL, SD3 or FLUX.1 checkpoint"


def find_family(file: WeightsFile, prefix: str) -> tuple[Family, Layout]:
    """Return the family of the model under `prefix` of a single file, and its layout.

    Raises:
        InputError: none fits, or the model takes more than latents (inpainting, editing).
    """
    shapes = file.shapes(prefix)
    for family in FAMILIES:
        if layout := family.infer(shapes):
            return _checked(file.path, family, layout.in_channels), layout
    if unet := infer_layout(shapes):
        raise _unknown(file.path, f"text width {unet.context_dim}, vector width {unet.vector_dim or 0}")
    raise InputError(f"{file.path} holds no model that can be trained: use {TRAINABLE}")


def find_folder_family(path: Path, config: Mapping[str, Any]) -> Family:
    """Return the family of a diffusers model by its config.

    Raises:
        InputError: none fits, or the model takes more than latents (inpainting, editing).
    """
    for family in FAMILIES:
        if family.matches(config):
            return _checked(path, family, family.config_channels(config))
    raise _unknown(path, f"{config.get('_class_name')}, text width {config.get('cross_attention_dim')}")


def _unknown(path: Path, description: str) -> InputError:
    return InputError(f"{path} is of an unknown family ({description}): use {TRAINABLE}")


def _checked(path: Path, family: Family, in_channels: int) -> Family:
    if in_channels != family.latent_channels:
        raise InputError(
            f"{path} takes {in_channels} input channels (an inpainting or editing model): train on the "
            "checkpoint it was made from"
        )
    return family
