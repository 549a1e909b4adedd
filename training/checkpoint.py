"""Base models: a single-file checkpoint as ComfyUI uses it, or a diffusers folder, read offline and in parts.

Nothing is loaded until a part is asked for, so that a trainer can encode with one part, free it and load the next.
"""

import functools
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import sha256_of_file
from .clip_weights import ClipWeights
from .noise_schedule import alphas_cumprod
from .text_encoders import CLIP_H, CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, ClipKind, TextEncoder, load_tower
from .tokenizer import load_tokenizer
from .unet import load_unet
from .unet_keys import UNetLayout, infer_layout
from .vae import Vae, has_vae, load_vae
from .weights_file import WeightsFile

Device = torch.device | str
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Family:
    """What a checkpoint's UNet must look like to belong to a family, and what goes with it."""

    name: str
    context_dim: int
    linear_projections: bool
    vector_dim: int | None
    latent_scale: float
    towers: tuple[tuple[ClipKind, tuple[str, ...]], ...]
    """The text encoders in order, each with the prefixes it is found under in single files."""

    def matches(self, layout: UNetLayout) -> bool:
        return (self.context_dim, self.linear_projections, self.vector_dim) == (
            layout.context_dim,
            layout.linear_projections,
            layout.vector_dim,
        )


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


class Checkpoint(ABC):
    """A base model whose parts are loaded when asked for, each anew, frozen; the caller frees them.

    Attributes:
        path: the file or folder.
        family: "sd15" (all of SD1.x), "sd20" (SD2.x) or "sdxl".
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        alphas_cumprod: [1000] float32, the noise schedule.
    """

    path: Path
    family: str
    prediction_type: str
    alphas_cumprod: Tensor

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self.path.name

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hex digest of the weights; computed once for a file that stays the same."""

    @abstractmethod
    def load_unet(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> nn.Module:
        """Load the UNet as a diffusers UNet2DConditionModel."""

    @abstractmethod
    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> TextEncoder:
        """Load the text encoder(s) and tokenizer.

        Raises:
            InputError: the checkpoint holds none, or no tokenizer is found.
        """

    @abstractmethod
    def load_vae(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Vae:
        """Load the VAE (in float32 where float16 is asked for, which it overflows).

        Raises:
            InputError: the checkpoint holds none.
        """

    def __repr__(self) -> str:
        return f"<{self.family} checkpoint {self.name}>"


def load_checkpoint(
    path: str | os.PathLike,
    *,
    tokenizer_folder: str | os.PathLike | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Open a checkpoint; reads names and shapes only, never the network.

    Args:
        path: a `.safetensors` file as ComfyUI's CheckpointLoaderSimple takes it, or a diffusers folder.
        tokenizer_folder: where CLIP's tokenizer lies; None looks in ComfyUI, then in the Hugging Face cache.
        prediction_type: "epsilon" or "v_prediction"; None infers it as ComfyUI does.

    Raises:
        InputError: no such file, a pickle, truncated, or of a family that cannot be trained.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise InputError(f"unknown prediction_type {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}")
    return SingleFileCheckpoint(Path(path), tokenizer_folder, prediction_type)


class SingleFileCheckpoint(Checkpoint):
    """UNet, text encoders and VAE in one safetensors file, with ldm's or sgm's names."""

    def __init__(
        self, path: Path, tokenizer_folder: str | os.PathLike | None = None, prediction_type: str | None = None
    ):
        self.path = path
        self._tokenizer_folder = tokenizer_folder
        self._file = WeightsFile(path)
        self._unet_prefix = "model.diffusion_model." if self._file.has_prefix("model.diffusion_model.") else ""
        layout = infer_layout(self._file.shapes(self._unet_prefix))
        self._layout, self._family = _recognise(path, layout)
        self.family = self._family.name
        self.prediction_type = prediction_type or self._infer_prediction_type()
        self.alphas_cumprod = alphas_cumprod(zero_terminal_snr={"v_pred", "ztsnr"} <= self._file.keys)

    def _infer_prediction_type(self) -> str:
        keys = self._file.keys
        if self.family == "sdxl":
            if {"edm_mean", "edm_vpred.sigma_max"} & keys:
                raise InputError(
                    f"{self.path} uses EDM noise levels (Playground 2.5, CosXL), which cannot be trained here; "
                    "use an SDXL checkpoint that predicts epsilon or v"
                )
            return "v_prediction" if "v_pred" in keys else "epsilon"
        # ComfyUI tells SD2's 768-pixel v models by this bias, which spreads wider than that of the 512-pixel ones.
        telling = f"{self._unet_prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        if self.family == "sd20" and telling in keys:
            return "v_prediction" if self._file.tensor(telling).float().std(unbiased=False) > 0.09 else "epsilon"
        return "epsilon"

    @property
    def sha256(self) -> str:
        state = self.path.stat()
        return _cached_sha256(self.path, state.st_size, state.st_mtime_ns)

    def load_unet(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> nn.Module:
        return load_unet(self._file, self._unet_prefix, self._layout, dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> TextEncoder:
        tokenizer = load_tokenizer(self._tokenizer_folder)
        towers = []
        for kind, prefixes in self._family.towers:
            found = [weights for prefix in prefixes if (weights := ClipWeights(self._file, prefix))]
            if not found:
                raise InputError(
                    f"{self.path} holds no text encoder ({' or '.join(prefixes)}*): use a full checkpoint, or join its "
                    "parts in ComfyUI with Save Checkpoint"
                )
            towers.append(load_tower(found[0], kind, tokenizer, dtype, device))
        return TextEncoder(towers)

    def load_vae(self, dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Vae:
        for prefix in ("first_stage_model.", "vae."):
            if has_vae(self._file, prefix):
                return load_vae(self._file, prefix, self._family.latent_scale, dtype, device)
        raise InputError(
            f"{self.path} holds no VAE (first_stage_model.*): use a full checkpoint, or join its parts in ComfyUI with "
            "Save Checkpoint"
        )


def _recognise(path: Path, layout: UNetLayout | None) -> tuple[UNetLayout, Family]:
    known = "known are SD1.x, SD2.x and SDXL"
    if layout is None:
        raise InputError(f"{path} holds no Stable Diffusion UNet: unknown family, {known}")
    if layout.in_channels != 4:
        raise InputError(
            f"{path} takes {layout.in_channels} input channels (an inpainting or editing model): train on the "
            "checkpoint it was made from"
        )
    for family in FAMILIES:
        if family.matches(layout):
            return layout, family
    raise InputError(
        f"{path} is of an unknown family (text width {layout.context_dim}, vector width {layout.vector_dim or 0}): "
        f"{known}"
    )


@functools.lru_cache(maxsize=32)
def _cached_sha256(path: Path, size: int, modified_ns: int) -> str:
    return sha256_of_file(path)
