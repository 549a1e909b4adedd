"""A checkpoint in a diffusers folder: `model_index.json` and one subfolder for each part."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .clip_weights import ClipWeights
from .families import FLOW, TRAINABLE, check_prediction_type, find_family, find_transformer_family
from .joint_text_encoders import T5Tower, join_text_encoder
from .noise_schedule import BETAS_FIRST_LAST, NUM_TIMESTEPS, alphas_cumprod
from .text_encoders import TextEncoder, load_tower
from .tokenizer import load_t5_tokenizer, load_tokenizer
from .vae import Vae, vae_precision
from .weights_file import WeightsFile, cached_sha256

_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_TRANSFORMERS = {
    "SD3Transformer2DModel": ("sd3", 1),
    "FluxTransformer2DModel": ("flux", 4),
}  # values in a patch channel


class DiffusersFolder:
    """A Checkpoint (see checkpoint.py) read from a folder. Only safetensors weights are read, never the network.

    Raises:
        InputError: not a diffusers folder, or of a family or noise schedule that cannot be trained.
    """

    def __init__(self, path: Path, tokenizer_folder: str | os.PathLike | None = None):
        self.path = path
        bundled = path / "tokenizer"
        self._tokenizer_folder = tokenizer_folder or (bundled if bundled.is_dir() else None)
        if (path / "transformer").is_dir():
            self._open_transformer()
        else:
            self._open_unet()
        self.family = self._family.name

    def _open_unet(self) -> None:
        path, unet = self.path, self._read_json("unet/config.json")
        self._family = find_family(
            path,
            context_dim=unet.get("cross_attention_dim", 0),
            linear_projections=bool(unet.get("use_linear_projection")),
            vector_dim=unet.get("projection_class_embeddings_input_dim"),
            in_channels=unet.get("in_channels", 4),
        )
        scheduler = self._read_json("scheduler/scheduler_config.json")
        betas = [scheduler.get(key) for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")]
        if betas != [*BETAS_FIRST_LAST, "scaled_linear", NUM_TIMESTEPS]:
            raise InputError(
                f"{path}/scheduler/scheduler_config.json: noise schedule {betas} is not Stable Diffusion's "
                f"({BETAS_FIRST_LAST[0]} to {BETAS_FIRST_LAST[1]}, scaled_linear); use another base model"
            )
        self.prediction_type = check_prediction_type(
            scheduler.get("prediction_type", "epsilon"), f"{path}/scheduler/scheduler_config.json: prediction_type"
        )
        self.alphas_cumprod = alphas_cumprod(zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")))
        self.shift = 1.0

    def _open_transformer(self) -> None:
        self._transformer = self._read_json("transformer/config.json")
        class_name = self._transformer.get("_class_name")
        if class_name not in _TRANSFORMERS:
            raise InputError(f"{self.path} holds a {class_name}: use {TRAINABLE}")
        name, patch = _TRANSFORMERS[class_name]
        self._family = find_transformer_family(self.path, name, self._transformer.get("in_channels", 16) // patch)
        scheduler = self._read_json("scheduler/scheduler_config.json")
        if scheduler.get("use_dynamic_shifting"):  # FLUX.1-dev: the shift at 1024 px, which ComfyUI takes for all sizes
            self.shift = math.exp(scheduler.get("max_shift", 1.15))
        else:
            self.shift = float(scheduler.get("shift", 1.0))
        self.prediction_type, self.alphas_cumprod = FLOW, torch.empty(0)

    def _read_json(self, relative: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / relative).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a complete diffusers folder (cannot read {relative}): name a folder with "
                "model_index.json, or a single .safetensors checkpoint"
            ) from error

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sha256(self) -> str:
        files = sorted(file for part in _PARTS for file in (self.path / part).glob("*.safetensors"))
        lines = [f"{file.relative_to(self.path).as_posix()} {cached_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        # imported where needed: it takes seconds
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

        if self._family.unet is None:
            model_class = FluxTransformer2DModel if self.family == "flux" else SD3Transformer2DModel
            return self._load(model_class, "transformer", dtype, device)
        return self._load(UNet2DConditionModel, "unet", dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        tokenizer = load_tokenizer(self._tokenizer_folder)
        towers = []
        for (kind, _), part in zip(self._family.towers, ("text_encoder", "text_encoder_2"), strict=False):
            files = self._weight_files(part)
            weights = ClipWeights(WeightsFile(files[0]), "")
            towers.append(load_tower(weights, kind, tokenizer, dtype, device))
        if not self._family.t5:
            return TextEncoder(towers)
        number, t5 = self._family.t5.number, None
        if self._family.t5.required or (self.path / f"text_encoder_{number}").is_dir():
            from transformers import T5EncoderModel

            bundled = self.path / f"tokenizer_{number}"
            t5_tokenizer = load_t5_tokenizer(bundled if bundled.is_dir() else None, self._tokenizer_folder)
            model = self._load(T5EncoderModel, f"text_encoder_{number}", dtype, device)
            t5 = T5Tower(model, t5_tokenizer, self._family.t5.num_tokens)
        return join_text_encoder(towers, t5, self._transformer["joint_attention_dim"])

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

    def __repr__(self) -> str:
        return f"<{self.family} checkpoint {self.name}>"
