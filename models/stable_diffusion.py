"""SD1.x, SD2.x and SDXL: UNets under Stable Diffusion's discrete noise, told apart by the width of their text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .denoiser import Denoiser, FlowError, UNetDenoiser
from .family import Family, Shapes
from .noise_schedule import BETAS_FIRST_LAST, NUM_TIMESTEPS, DiscreteNoise, Noise, alphas_cumprod
from .text_encoders import CLIP_H, CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L
from .unet import load_unet
from .unet_keys import UNetLayout, infer_layout
from .weights_file import WeightsFile


@dataclass(frozen=True)
class UNetNumbers:
    """What identifies a UNet's family, by the rules of comfy/supported_models.py."""

    context_dim: int
    linear_projections: bool
    vector_dim: int | None = None
    """Width of the vector condition; None where there is none."""


class UNetFamily(Family[UNetLayout]):
    """What all of them share; a subclass says its numbers."""

    diffusers_class, part, latent_channels = "UNet2DConditionModel", "unet", 4
    numbers: UNetNumbers

    def infer(self, shapes: Shapes) -> UNetLayout | None:
        layout = infer_layout(shapes)
        if layout is None:
            return None
        found = UNetNumbers(layout.context_dim, layout.linear_projections, layout.vector_dim)
        return layout if found == self.numbers else None

    def matches(self, config: Mapping[str, Any]) -> bool:
        return self.numbers == UNetNumbers(
            config.get("cross_attention_dim", 0),
            bool(config.get("use_linear_projection")),
            config.get("projection_class_embeddings_input_dim"),
        )

    def file_noise(self, file: WeightsFile, prefix: str, layout: UNetLayout) -> DiscreteNoise:
        schedule = alphas_cumprod(zero_terminal_snr={"v_pred", "ztsnr"} <= file.keys())
        return DiscreteNoise(schedule, self._prediction_type(file, prefix))

    def _prediction_type(self, file: WeightsFile, prefix: str) -> str:
        return "epsilon"

    def folder_noise(self, scheduler: Mapping[str, Any], where: str) -> DiscreteNoise:
        betas = [scheduler.get(key) for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")]
        if betas != [*BETAS_FIRST_LAST, "scaled_linear", NUM_TIMESTEPS]:
            raise InputError(
                f"{where}: noise schedule {betas} is not Stable Diffusion's ({BETAS_FIRST_LAST[0]} to "
                f"{BETAS_FIRST_LAST[1]}, scaled_linear); use another base model"
            )
        schedule = alphas_cumprod(zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")))
        predicted = scheduler.get("prediction_type", "epsilon")
        return DiscreteNoise(schedule).predicting(predicted, f"{where}: prediction_type")

    def load(
        self, file: WeightsFile, prefix: str, layout: UNetLayout, dtype: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        return load_unet(file, prefix, layout, dtype, device)

    def make_denoiser(
        self, model: nn.Module, noise: Noise, autocast_dtype: torch.dtype | None, flow_error: FlowError
    ) -> Denoiser:
        assert isinstance(noise, DiscreteNoise)
        return UNetDenoiser(model, noise.alphas_cumprod, noise.prediction_type, autocast_dtype)


class SD15(UNetFamily):
    name, numbers, latent_scale = "sd15", UNetNumbers(768, False), 0.18215
    towers = ((CLIP_L, ("cond_stage_model.",)),)


class SD20(UNetFamily):
    name, numbers, latent_scale = "sd20", UNetNumbers(1024, True), 0.18215
    towers = ((CLIP_H, ("cond_stage_model.model.", "conditioner.embedders.0.model.")),)

    def _prediction_type(self, file: WeightsFile, prefix: str) -> str:
        # ComfyUI tells SD2's 768-pixel v models by this bias, which spreads wider than that of the 512-pixel ones.
        telling = f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        is_wide = telling in file and file.tensor(telling).float().std(unbiased=False) > 0.09
        return "v_prediction" if is_wide else "epsilon"


class SDXL(UNetFamily):
    name, numbers, latent_scale = "sdxl", UNetNumbers(2048, True, 2816), 0.13025
    towers = ((SDXL_CLIP_L, ("conditioner.embedders.0.",)), (SDXL_CLIP_G, ("conditioner.embedders.1.model.",)))

    def _prediction_type(self, file: WeightsFile, prefix: str) -> str:
        if {"edm_mean", "edm_vpred.sigma_max"} & file.keys():
            raise InputError(
                f"{file.path} uses EDM noise levels (Playground 2.5, CosXL), which cannot be trained here; "
                "use an SDXL checkpoint that predicts epsilon or v"
            )
        return "v_prediction" if "v_pred" in file else "epsilon"
