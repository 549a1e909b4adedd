"""A checkpoint in one safetensors file: UNet or transformer, text encoders and VAE under their authors' names."""

import os
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from .clip_weights import ClipWeights
from .families import FLOW, TRAINABLE, find_family, find_transformer_family
from .flow import shift_of
from .joint_text_encoders import T5Tower, join_text_encoder, load_t5
from .noise_schedule import alphas_cumprod
from .text_encoders import TextEncoder, load_tower
from .tokenizer import load_t5_tokenizer, load_tokenizer
from .transformer import load_transformer
from .transformer_keys import TransformerLayout, infer_transformer
from .unet import load_unet
from .unet_keys import infer_layout
from .vae import Vae, has_vae, load_vae
from .weights_file import WeightsFile, cached_sha256

_UNET_PREFIX = "model.diffusion_model."
_VAE_PREFIXES = ("first_stage_model.", "vae.")
_T5_PREFIX = "text_encoders.t5xxl.transformer."

_QUANTISATION_MARKS = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")


class SingleFile:
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
        self._unet_prefix = _UNET_PREFIX if self._file.has_prefix(_UNET_PREFIX) else ""
        shapes = self._file.shapes(self._unet_prefix)
        layout = infer_layout(shapes) or infer_transformer(shapes)
        if layout is None:
            raise InputError(f"{path} holds no model that can be trained: use {TRAINABLE}")
        self._layout = layout
        if isinstance(layout, TransformerLayout):
            self._family = find_transformer_family(path, layout.family, layout.in_channels)
            self.family, self.prediction_type = self._family.name, FLOW
            self.alphas_cumprod, self.shift = torch.empty(0), shift_of(layout.family, layout.has_guidance)
            return
        self._family = find_family(
            path,
            context_dim=layout.context_dim,
            linear_projections=layout.linear_projections,
            vector_dim=layout.vector_dim,
            in_channels=layout.in_channels,
        )
        self.family = self._family.name
        self.prediction_type = self._infer_prediction_type()
        self.alphas_cumprod = alphas_cumprod(zero_terminal_snr={"v_pred", "ztsnr"} <= self._file.keys())
        self.shift = 1.0

    def _infer_prediction_type(self) -> str:
        keys = self._file.keys()
        if self.family == "sdxl":
            if {"edm_mean", "edm_vpred.sigma_max"} & keys:
                raise InputError(
                    f"{self.path} uses EDM noise levels (Playground 2.5, CosXL), which cannot be trained here; "
                    "use an SDXL checkpoint that predicts epsilon or v"
                )
            return "v_prediction" if "v_pred" in keys else "epsilon"
        # ComfyUI tells SD2's 768-pixel v models by this bias, which spreads wider than that of the 512-pixel ones.
        telling = f"{self._unet_prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        if self.family == "sd20" and telling in keys and self._file.tensor(telling).float().std(unbiased=False) > 0.09:
            return "v_prediction"
        return "epsilon"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sha256(self) -> str:
        return cached_sha256(self.path)

    def load_model(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
        if isinstance(self._layout, TransformerLayout):
            return load_transformer(self._file, self._unet_prefix, self._layout, dtype, device)
        return load_unet(self._file, self._unet_prefix, self._layout, dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TextEncoder:
        tokenizer = load_tokenizer(self._tokenizer_folder)
        towers = []
        for kind, prefixes in self._family.towers:
            found = [weights for prefix in prefixes if (weights := ClipWeights(self._file, prefix))]
            if not found:
                raise self._lacks("text encoder", prefixes)
            towers.append(load_tower(found[0], kind, tokenizer, dtype, device))
        if not self._family.t5:
            return TextEncoder(towers)
        t5 = None
        if self._file.has_prefix(_T5_PREFIX):
            t5_tokenizer = load_t5_tokenizer(clip_folder=self._tokenizer_folder)
            t5 = T5Tower(load_t5(self._file, _T5_PREFIX, dtype, device), t5_tokenizer, self._family.t5.num_tokens)
        elif self._family.t5.required:
            raise self._lacks("text encoder", (_T5_PREFIX,))
        return join_text_encoder(towers, t5, self._layout.context_dim)

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

    def __repr__(self) -> str:
        return f"<{self.family} checkpoint {self.name}>"
