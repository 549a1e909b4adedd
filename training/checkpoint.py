"""Base models: a single-file checkpoint as ComfyUI uses it, or a diffusers folder, read offline and in parts."""

import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .diffusers_folder import DiffusersFolder
from .families import check_prediction_type
from .single_file import SingleFile
from .text_encoders import TextEncoder
from .vae import Vae


class Checkpoint(Protocol):
    """A base model whose parts are loaded when asked for.

    Each load gives a new, frozen model, which the caller frees: a trainer encodes with one part, drops it and loads
    the next, and they are never all in memory.

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

    @property
    def sha256(self) -> str:
        """Hex digest of the weights; computed once for files that stay the same."""

    def load_unet(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """Load the UNet as a diffusers UNet2DConditionModel."""

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text encoders and their tokenizer.

        Raises:
            InputError: the checkpoint holds none, or no tokenizer is found.
        """

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Vae:
        """Load the VAE, in float32 where float16 is asked for (which Stable Diffusion's VAE overflows).

        Raises:
            InputError: the checkpoint holds none.
        """


def load_checkpoint(
    path: str | os.PathLike,
    *,
    tokenizer_folder: str | os.PathLike | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Open a checkpoint; reads names and shapes only, never the network.

    Args:
        path: a `.safetensors` file as ComfyUI's CheckpointLoaderSimple takes it, or a diffusers folder.
        tokenizer_folder: where CLIP's tokenizer lies; None looks in the diffusers folder, in ComfyUI, then in the
            Hugging Face cache.
        prediction_type: "epsilon" or "v_prediction"; None infers it as ComfyUI does.

    Raises:
        InputError: no such file, a pickle, truncated, or of a family that cannot be trained.
    """
    source = Path(path)
    opened: Checkpoint
    opened = DiffusersFolder(source, tokenizer_folder) if source.is_dir() else SingleFile(source, tokenizer_folder)
    if prediction_type is not None:
        opened.prediction_type = check_prediction_type(prediction_type, "prediction_type")
    return opened
