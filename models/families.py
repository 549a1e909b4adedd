"""The families of base models that can be trained, and how the weights show which one they belong to."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .joint_text_encoders import FLUX_T5_TOKENS, SD3_T5_TOKENS
from .text_encoders import CLIP_H, CLIP_L, FLUX_CLIP_L, SD3_CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, ClipKind
from .transformer_keys import LATENT_CHANNELS

PREDICTION_TYPES = ("epsilon", "v_prediction")
FLOW = "flow"
TRAINABLE = "an SD1.x, SD2.x, SDXL, SD3 or FLUX.1 checkpoint"


@dataclass(frozen=True)
class UNetNumbers:
    """What identifies a UNet's family."""

    context_dim: int
    linear_projections: bool
    vector_dim: int | None = None
    """Width of the vector condition; None where there is none."""


@dataclass(frozen=True)
class T5Kind:
    """How a family uses T5, which single files hold under `text_encoders.t5xxl.`."""

    num_tokens: int
    number: int
    """Of the text encoder and its tokenizer in a diffusers folder."""
    required: bool


@dataclass(frozen=True)
class Family:
    """A family: what identifies its UNet (None: a transformer), and what goes with it."""

    name: str
    unet: UNetNumbers | None
    latent_scale: float
    """UNet latents = (VAE latents - latent_shift) · latent_scale."""
    towers: tuple[tuple[ClipKind, tuple[str, ...]], ...]
    """The CLIP text encoders in order, each with the prefixes it is found under in single files."""
    latent_shift: float = 0.0
    t5: T5Kind | None = None


FAMILIES = (
    Family("sd15", UNetNumbers(768, False), 0.18215, ((CLIP_L, ("cond_stage_model.",)),)),
    Family(
        "sd20",
        UNetNumbers(1024, True),
        0.18215,
        ((CLIP_H, ("cond_stage_model.model.", "conditioner.embedders.0.model.")),),
    ),
    Family(
        "sdxl",
        UNetNumbers(2048, True, 2816),
        0.13025,
        ((SDXL_CLIP_L, ("conditioner.embedders.0.",)), (SDXL_CLIP_G, ("conditioner.embedders.1.model.",))),
    ),
    Family(
        "sd3",
        None,
        1.5305,
        ((SD3_CLIP_L, ("text_encoders.clip_l.",)), (SDXL_CLIP_G, ("text_encoders.clip_g.",))),
        latent_shift=0.0609,
        t5=T5Kind(SD3_T5_TOKENS, 3, required=False),
    ),
    Family(
        "flux",
        None,
        0.3611,
        ((FLUX_CLIP_L, ("text_encoders.clip_l.",)),),
        latent_shift=0.1159,
        t5=T5Kind(FLUX_T5_TOKENS, 2, required=True),
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
        if family.unet == UNetNumbers(context_dim, linear_projections, vector_dim):
            return _checked(source, family, in_channels, 4)
    raise InputError(
        f"{source} is of an unknown family (text width {context_dim}, vector width {vector_dim or 0}): use {TRAINABLE}"
    )


def find_transformer_family(source: Path, name: str, in_channels: int) -> Family:
    """Return the family of a transformer, "sd3" or "flux".

    Raises:
        InputError: it takes more than latents; the message names `source`.
    """
    family = next(family for family in FAMILIES if family.name == name)
    return _checked(source, family, in_channels, LATENT_CHANNELS)


def _checked(source: Path, family: Family, in_channels: int, expected: int) -> Family:
    if in_channels != expected:
        raise InputError(
            f"{source} takes {in_channels} input channels (an inpainting or editing model): train on the "
            "checkpoint it was made from"
        )
    return family
