"""The families of base models that can be trained, and how a UNet shows which one it belongs to."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .text_encoders import CLIP_H, CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, ClipKind

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Family:
    """A family: the numbers of the UNet that identify it, and what goes with it."""

    name: str
    context_dim: int
    linear_projections: bool
    vector_dim: int | None
    """Width of the vector condition; None where there is none."""
    latent_scale: float
    """UNet latents = VAE latents · latent_scale."""
    towers: tuple[tuple[ClipKind, tuple[str, ...]], ...]
    """The text encoders in order, each with the prefixes it is found under in single files."""


FAMILIES = (
    Family("sd15", 768, False, None, 0.18215, ((CLIP_L, ("cond_stage_model.",)),)),
    Family(
        "sd20", 1024, True, None, 0.18215, ((CLIP_H, ("cond_stage_model.model.", "conditioner.embedders.0.model.")),)
    ),
    Family(
        "sdxl",
        2048,
        True,
        2816,
        0.13025,
        ((SDXL_CLIP_L, ("conditioner.embedders.0.",)), (SDXL_CLIP_G, ("conditioner.embedders.1.model.",))),
    ),
)


def check_prediction_type(value: str, where: str) -> str:
    """Return `value` if it is something a UNet can be trained to predict.

    Raises:
        InputError: it is not; the message begins with `where`.
    """
    if value not in PREDICTION_TYPES:
        raise InputError(f"{where} is {value!r}; only {' and '.join(PREDICTION_TYPES)} can be trained")
    return value


def find_family(
    source: Path, *, context_dim: int, linear_projections: bool, vector_dim: int | None, in_channels: int
) -> Family:
    """Return the family of a UNet, by the rules of comfy/supported_models.py.

    Raises:
        InputError: none fits, or the UNet takes more than latents (inpainting, editing); the message names `source`.
    """
    for family in FAMILIES:
        expected = (family.context_dim, family.linear_projections, family.vector_dim)
        if expected == (context_dim, linear_projections, vector_dim):
            if in_channels != 4:
                raise InputError(
                    f"{source} takes {in_channels} input channels (an inpainting or editing model): train on the "
                    "checkpoint it was made from"
                )
            return family
    raise InputError(
        f"{source} is of an unknown family (text width {context_dim}, vector width {vector_dim or 0}): "
        "use an SD1.x, SD2.x or SDXL checkpoint"
    )
