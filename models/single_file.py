"""A checkpoint in one safetensors file: UNet or transformer, text encoders and VAE under their authors' names."""

import os
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from .clip_weights import ClipWeights
from .families import find_family
from .noise_schedule import Noise
from .opened_checkpoint import OpenedCheckpoint
from .t5 import T5Tower, load_t5
from .text_encoders import TextEncoder, load_tower
from .tokenizer import load_t5_tokenizer, load_tokenizer
from .vae import Vae, has_vae, load_vae
from .weights_file import WeightsFile, cached_sha256

_MODEL_PREFIX = "model.diffusion_model."
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_T5_PREFIX = "text_encoders.t5xxl.transformer."

_QUANTISATION_MARKS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")


class SingleFile(OpenedCheckpoint):
    """A Checkpoint (see checkpoint.py) read from one file.

    Raises:
        InputError: no such file, a pickle, truncated, or of a family that cannot be trained.
    """

    def __init__(self, path: Path, tokenizer_folder: str | os.PathLike | None = None):
        self.path = path
        self._tokenizer_folder = tokenizer_folder
        self._file = WeightsFile(path)
        if any(key.endswith(_QUANTISATION_MARKS) for key in self._file):
            raise InputError(
                f"{path} holds scaled 8-bit weights, which cannot be trained on: use its fp16 or bf16 version"
            )
        self._prefix = _MODEL_PREFIX if self._file.has_prefix(_MODEL_PREFIX) else ""
        self._family, self._layout = find_family(self._file, self._prefix)
        self.family = self._family.name
        self.noise: Noise = self._family.file_noise(self._file, self._prefix, self._layout)

    @property
    def sha256(self) -> str:
        return cached_sha256(self.path)

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        return self._family.load(self._file, self._prefix, self._layout, dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        tokenizer = load_tokenizer(self._tokenizer_folder)
        towers = []
        for kind, prefixes in self._family.towers:
            found = [weights for prefix in prefixes if (weights := ClipWeights(self._file, prefix))]
            if not found:
                raise self._lacks("text encoder", prefixes)
            towers.append(load_tower(found[0], kind, tokenizer, dtype, device))
        t5_kind, t5 = self._family.t5, None
        if t5_kind and self._file.has_prefix(_T5_PREFIX):
            t5_tokenizer = load_t5_tokenizer(clip_folder=self._tokenizer_folder)
            t5 = T5Tower(load_t5(self._file, _T5_PREFIX, dtype, device), t5_tokenizer, t5_kind.num_tokens)
        elif t5_kind and t5_kind.required:
            raise self._lacks("text encoder", (_T5_PREFIX,))
        return self._family.join(towers, t5, self._layout.context_dim)

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Vae:
        family = self._family
        for prefix in _VAE_PREFIXES:
            if has_vae(self._file, prefix):
                return load_vae(self._file, prefix, family.latent_scale, family.latent_shift, dtype, device)
        raise self._lacks("VAE", _VAE_PREFIXES)

    def _lacks(self, part: str, prefixes: tuple[str, ...]) -> InputError:
        return InputError(
            f"{self.path} holds no {part} (keys {' or '.join(f'{prefix}*' for prefix in prefixes)}): use a full "
            "checkpoint or a diffusers folder, or join the parts in ComfyUI with Save Checkpoint"
        )
