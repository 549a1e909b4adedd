"""A MODEL's UNet and its CLIP, open to an attacker: predictions that can be differentiated by what the words gave."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import torch
from torch import Tensor

from ...errors import InputError
from ...models.clip_weights import ClipWeights
from ...models.denoiser import Conditions
from ...models.text_encoders import CLIP_H, CLIP_L, SDXL_CLIP_G, SDXL_CLIP_L, ClipTower, TextEncoder, load_tower
from . import kernels, refusals
from .denoiser import NativeDenoiser, plain_attention, raw_output
from .policy import leave_inference

# Names of ComfyUI's text towers -> what they are, in the order in which a UNet is given them.
_KINDS = {("l",): (CLIP_L,), ("h",): (CLIP_H,), ("l", "g"): (SDXL_CLIP_L, SDXL_CLIP_G)}


class AttackedDenoiser(NativeDenoiser):
    """Conditions are `hidden_states` [b, 77, d] and, for SDXL, `pooled` [b, p], as text_encoders.py gives them."""

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        given: dict[str, Any] = {"c_crossattn": conditions["hidden_states"].to(noisy.device)}
        if "pooled" in conditions:
            height_px, width_px = noisy.shape[-2] * 8, noisy.shape[-1] * 8
            given["y"] = self.model.encode_adm(
                pooled_output=conditions["pooled"], width=width_px, height=height_px, device=noisy.device
            )
        with kernels.training_mode(), raw_output(self.sampling, raw=True):
            return self.model.apply_model(
                noisy,
                self.sigmas(timesteps),
                transformer_options={"optimized_attention_override": plain_attention},
                **given,
            ).float()


class AttackedModels:
    """The graph's models by arm, one of them at a time with its patches in its weights.

    Args:
        models: arm -> MODEL; all of them variants of one.

    Raises:
        InputError: one is no UNet, or has more on it than weights, which this attack would leave out.
    """

    def __init__(self, models: Mapping[str, Any]):
        for arm, model in models.items():
            refusals.check_model(model)
            if type(model.model) not in (comfy.model_base.BaseModel, comfy.model_base.SDXL) or model.model.concat_keys:
                raise InputError(
                    f"{type(model.model).__name__} is no UNet (SD 1.x, SD 2.x, SDXL), through which alone there is an "
                    "attack; search through the text encoder"
                )
            if more := refusals.more_than_weights(model):
                raise InputError(
                    f"{arm} has {', '.join(more)} on it, which an attack through the UNet would leave out: search "
                    "through the text encoder"
                )
        self._models, self._carried = models, ""
        self._clone: Any = None

    @contextlib.contextmanager
    def carrying(self, arm: str) -> Iterator[None]:
        """Inside, `denoiser` is that arm's, on its device."""
        if arm != self._carried:
            clone = self._models[arm].clone(**({"disable_dynamic": True} if self._models[arm].is_dynamic() else {}))
            comfy.model_management.unload_model_and_clones(self._models[arm])
            leave_inference(clone.model)
            clone.model.requires_grad_(False)
            with torch.inference_mode(False):
                comfy.model_management.load_models_gpu([clone], force_full_load=True)
                leave_inference(clone.model)
            self._clone, self._carried = clone, arm
        yield

    @property
    def denoiser(self) -> AttackedDenoiser:
        return AttackedDenoiser(self._clone, checkpoint_blocks=False)

    def latents_in(self, latents: Tensor) -> Tensor:
        """Return a VAE's latents in the model's own scale, on its device."""
        found = next(iter(self._models.values())).model.process_latent_in(latents.float())
        return found.to(comfy.model_management.get_torch_device()).clone()

    def close(self) -> None:
        """Unload what was loaded for the attack: the graph's models are as they came."""
        if self._carried:
            comfy.model_management.unload_model_and_clones(self._clone)
            self._carried = ""


class _Weights:
    """A state dict where a weights file is expected."""

    path = Path("CLIP")

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def text_encoder_of(clip) -> TextEncoder:
    """Return a copy of CLIP, its LoRAs included, that gradients go through.

    Raises:
        InputError: it is no CLIP of SD 1.x, SD 2.x or SDXL, or is stopped at another layer.
    """
    names = tuple(clip.tokenize(""))
    if names not in _KINDS and names[::-1] in _KINDS:
        names = names[::-1]
    if names not in _KINDS or getattr(clip.patcher, "hook_patches", None) or clip.layer_idx is not None:
        raise InputError(
            "an attack needs the CLIP of SD 1.x, SD 2.x or SDXL as its checkpoint gives it, without CLIP Set Last Layer"
        )
    if clip.patcher.is_dynamic() and clip.patcher.patches:
        raise InputError("this CLIP adds its LoRAs while it computes: start ComfyUI with --disable-dynamic-vram")
    clip.load_model()
    device = comfy.model_management.get_torch_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    towers: list[ClipTower] = []
    with torch.inference_mode(False):
        for name, kind in zip(names, _KINDS[names], strict=True):
            state = getattr(clip.cond_stage_model, f"clip_{name}").transformer.state_dict()
            weights: Any = _Weights({key: value.detach().clone() for key, value in state.items()})
            tokenizer = getattr(clip.tokenizer, f"clip_{name}").tokenizer
            towers.append(load_tower(ClipWeights(weights, ""), kind, tokenizer, dtype, device))
    return TextEncoder(towers)


def encode_for(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the conditions that `AttackedDenoiser` takes, outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return encoder.encode_prompts(prompts)
