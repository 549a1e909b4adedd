"""Base models: a single-file checkpoint as ComfyUI uses it, or a diffusers folder, read offline and in parts."""

import os
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..checkpoint_id import CheckpointId
from .denoiser import Denoiser, FlowError
from .diffusers_folder import DiffusersFolder
from .noise_schedule import Noise
from .single_file import SingleFile
from .text_encoders import TextEncoder
from .vae import Vae


class Checkpoint(Protocol):
    """A base model whose parts are loaded when asked for.

    Each load gives a new, frozen model, which the caller frees: a trainer encodes with one part, drops it and loads
    the next, and they are never all in memory.

    Attributes:
        path: the file or folder.
        family: "sd15" (all of SD1.x), "sd20" (SD2.x), "sdxl", "sd3" (with SD3.5) or "flux" (FLUX.1).
        noise: what it was trained under, and so what it predicts (noise_schedule.py).
    """

    path: Path
    family: str
    noise: Noise

    @property
    def name(self) -> str:
        """The file's or folder's name."""

    @property
    def id(self) -> CheckpointId:
        """What files say of it that were drawn by it or trained on it."""

    @property
    def encoding_id(self) -> str:
        """What its VAE and text encoders give is kept under; the same for models that encode alike."""

    @property
    def prediction_type(self) -> str:
        """What the model predicts: "epsilon" or "v_prediction"; "flow" for SD3 and FLUX."""

    @property
    def sha256(self) -> str:
        """Hex digest of the weights; computed once for files that stay the same."""

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        """Load the UNet or transformer as diffusers' UNet2DConditionModel, SD3- or FluxTransformer2DModel."""

    def make_denoiser(
        self, model: nn.Module, autocast_dtype: torch.dtype | None = None, flow_error: FlowError = "velocity"
    ) -> Denoiser:
        """Return the denoiser of the checkpoint's family over its `model`.

        Args:
            autocast_dtype: compute dtype, or None to compute in the weights' own.
            flow_error: what SD3 and FLUX compare (see flow.py).
        """

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text encoders and their tokenizer.

        Raises:
            InputError: the checkpoint holds none, or no tokenizer is found.
        """

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Vae:
        """Load the VAE, in float32 where float16 is asked for (which the VAEs overflow).

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
            Hugging Face cache. T5's is looked for in the diffusers folder and in ComfyUI.
        prediction_type: "epsilon" or "v_prediction" of a UNet; None infers it as ComfyUI does.

    Raises:
        InputError: no such file, a pickle, truncated, or of a family that cannot be trained.
    """
    source = Path(path)
    opened: Checkpoint
    opened = DiffusersFolder(source, tokenizer_folder) if source.is_dir() else SingleFile(source, tokenizer_folder)
    if prediction_type is not None:
        opened.noise = opened.noise.predicting(prediction_type, "prediction_type")
    return opened
