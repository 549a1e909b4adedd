"""A checkpoint in a diffusers folder: `model_index.json` and one subfolder for each part."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .clip_weights import ClipWeights
from .families import find_folder_family
from .noise_schedule import Noise
from .opened_checkpoint import OpenedCheckpoint
from .t5 import T5Tower
from .text_encoders import TextEncoder, load_tower
from .tokenizer import load_t5_tokenizer, load_tokenizer
from .vae import Vae, vae_precision
from .weights_file import WeightsFile, cached_sha256

_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


class DiffusersFolder(OpenedCheckpoint):
    """A Checkpoint (see checkpoint.py) read from a folder. Only safetensors weights are read, never the network.

    Raises:
        InputError: not a diffusers folder, or of a family or noise schedule that cannot be trained.
    """

    def __init__(self, path: Path, tokenizer_folder: str | os.PathLike | None = None):
        self.path = path
        bundled = path / "tokenizer"
        self._tokenizer_folder = tokenizer_folder or (bundled if bundled.is_dir() else None)
        part = "transformer" if (path / "transformer").is_dir() else "unet"
        self._config = self._read_json(f"{part}/config.json")
        self._family = find_folder_family(path, self._config)
        self.family = self._family.name
        scheduler = "scheduler/scheduler_config.json"
        self.noise: Noise = self._family.folder_noise(self._read_json(scheduler), f"{path}/{scheduler}")

    def _read_json(self, relative: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / relative).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a complete diffusers folder (cannot read {relative}): name a folder with "
                "model_index.json, or a single .safetensors checkpoint"
            ) from error

    @property
    def sha256(self) -> str:
        files = sorted(file for part in _PARTS for file in (self.path / part).glob("*.safetensors"))
        lines = [f"{file.relative_to(self.path).as_posix()} {cached_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        import diffusers  # imported where needed: it takes seconds

        return self._load(getattr(diffusers, self._family.diffusers_class), self._family.part, dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        tokenizer = load_tokenizer(self._tokenizer_folder)
        towers = []
        for (kind, _), part in zip(self._family.towers, ("text_encoder", "text_encoder_2"), strict=False):
            files = self._weight_files(part)
            weights = ClipWeights(WeightsFile(files[0]), "")
            towers.append(load_tower(weights, kind, tokenizer, dtype, device))
        t5_kind, t5 = self._family.t5, None
        if t5_kind and (t5_kind.required or (self.path / f"text_encoder_{t5_kind.number}").is_dir()):
            from transformers import T5EncoderModel

            bundled = self.path / f"tokenizer_{t5_kind.number}"
            t5_tokenizer = load_t5_tokenizer(bundled if bundled.is_dir() else None, self._tokenizer_folder)
            model = self._load(T5EncoderModel, f"text_encoder_{t5_kind.number}", dtype, device)
            t5 = T5Tower(model, t5_tokenizer, t5_kind.num_tokens)
        return self._family.join(towers, t5, self._config.get("joint_attention_dim", 0))

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Vae:
        from diffusers import AutoencoderKL, AutoencoderTiny

        if self._read_json("vae/config.json").get("_class_name") == "AutoencoderTiny":
            model = self._load(AutoencoderTiny, "vae", dtype, device)
        else:
            model = self._load(AutoencoderKL, "vae", vae_precision(dtype), device)
        return Vae(model, model.config.scaling_factor, shift=-(model.config.shift_factor or 0.0))

    def _weight_files(self, part: str) -> list[Path]:
        """Return a part's weight files, those without a variant in their name (`.fp16`) first."""
        files = sorted((self.path / part).glob("*.safetensors"), key=lambda file: (len(file.suffixes), file.name))
        if not files:
            raise InputError(
                f"{self.path}/{part} holds no .safetensors weights: download them, or use a single .safetensors "
                "checkpoint"
            )
        return files

    def _load(self, model_class: Any, part: str, dtype: torch.dtype, device: torch.device | str) -> Any:
        has_variant = ".fp16" in self._weight_files(part)[0].name  # of one file or of the first of several
        try:
            model = model_class.from_pretrained(
                str(self.path),
                subfolder=part,
                torch_dtype=dtype,
                variant="fp16" if has_variant else None,
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"cannot load {self.path}/{part}: {reason}; download the folder again") from error
        return model.to(device).requires_grad_(False).eval()
