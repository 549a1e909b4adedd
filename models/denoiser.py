"""One interface over model families: how latents are noised, what is predicted, what conditions the prediction."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

# name -> Tensor [b, ...], rows aligned with the latents; where they differ in length a list of b tensors or None
Conditions = Mapping[str, Any]
# number of the step, prediction for the prompts [b, c, h, w], predictor of the same latents under other conditions of b
# rows -> what takes the place of the prediction for the prompts
Guide = Callable[[int, Tensor, Callable[[Conditions], Tensor]], Tensor]
FlowError = Literal["velocity", "x0"]  # what flow models compare, see flow.py
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 5.0


@dataclass(frozen=True)
class StartImage:
    """What image-to-image drawing starts from.

    Args:
        latents: [b, c, h, w].
        denoise: how much is drawn anew, above 0 and below 1, as in ComfyUI's KSampler: the steps are the last ones of
            steps / denoise. diffusers' pipelines call it `strength`, of all steps.
    """

    latents: Tensor
    denoise: float

    def num_levels(self, num_steps: int) -> int:
        """Return the steps of the whole way from noise, of which `num_steps` are done."""
        return int(num_steps / self.denoise)


class Denoiser(Protocol):
    """What a trainer needs of a model. Latents, noise and predictions are [b, c, h, w], timesteps [b] int64, 0..999.

    Attributes:
        model: the UNet or transformer.
        autocast_dtype: what it computes in; None: in the weights' own.
    """

    model: nn.Module
    autocast_dtype: torch.dtype | None

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def pure_noise(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the model sees of no picture at all; `add_noise` leaves a little of it at every timestep."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor: ...

    def sample(
        self,
        noise: Tensor,
        conditions: Conditions,
        num_steps: int = SAMPLE_STEPS,
        guidance: float = SAMPLE_GUIDANCE,
        *,
        start: StartImage | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Return latents [b, c, h, w] drawn in few steps by the family's usual solver.

        Args:
            noise: [b, c, h, w], standard normal.
            conditions: 2b rows: those of the prompts, then those of the empty prompt.
            guidance: classifier-free, for models that are not distilled.
            start: begin with this image under some of the noise, in place of noise alone.
            guide: changes the prediction for the prompts, in each step.
        """


def conditions_on(device: torch.device | str, conditions: Conditions) -> Conditions:
    """Return the conditions on a device, numbers in float32."""

    def move(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    return {
        name: [move(row) for row in value] if isinstance(value, list) else move(value)
        for name, value in conditions.items()
    }


def computing_in(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, a model computes in `dtype` by autocast; None: in the weights' own."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


class UNetDenoiser:
    """SD1.x, SD2.x and SDXL UNets under the discrete DDPM schedule, predicting noise or velocity.

    Args:
        model: a diffusers UNet2DConditionModel.
        alphas_cumprod: [T] float32.
        prediction_type: "epsilon" (target = noise) or "v_prediction" (target = sqrt(a) noise - sqrt(1-a) latents).
        autocast_dtype: compute dtype, or None to compute in the weights' own.
    """

    def __init__(
        self, model: nn.Module, alphas_cumprod: Tensor, prediction_type: str, autocast_dtype: torch.dtype | None = None
    ):
        self.model = model
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type
        self.autocast_dtype = autocast_dtype

    def _coefficients(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread = self._coefficients(latents, timesteps)
        return signal * latents + spread * noise

    def pure_noise(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._coefficients(latents, timesteps)
        return signal * noise - spread * latents

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        added = None
        if "pooled" in conditions:
            height_px, width_px = noisy.shape[2] * 8, noisy.shape[3] * 8
            # SDXL's size conditioning: original size, crop, target size (height first), as ComfyUI's encode_adm gives.
            sizes = torch.tensor([height_px, width_px, 0, 0, height_px, width_px], dtype=torch.float32)
            added = {
                "text_embeds": conditions["pooled"],
                "time_ids": sizes.to(noisy.device).expand(len(noisy), -1),
            }
        with computing_in(self.autocast_dtype, noisy.device):
            # Once here, instead of in every cross-attention layer.
            hidden = conditions["hidden_states"].to(self.autocast_dtype or torch.float32)
            return self.model(
                noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
            )[0].float()

    def sample(
        self,
        noise: Tensor,
        conditions: Conditions,
        num_steps: int = SAMPLE_STEPS,
        guidance: float = SAMPLE_GUIDANCE,
        use_karras_sigmas: bool = False,
        *,
        start: StartImage | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Return latents by DPM-Solver++ (2M) with classifier-free guidance; see `Denoiser.sample`."""
        from diffusers import DPMSolverMultistepScheduler  # imported where needed: it takes seconds

        alphas = self.alphas_cumprod.double()
        betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
        scheduler: Any = DPMSolverMultistepScheduler(
            trained_betas=betas.numpy(), prediction_type=self.prediction_type, use_karras_sigmas=use_karras_sigmas
        )
        latents = noise
        scheduler.set_timesteps(start.num_levels(num_steps) if start else num_steps, device=noise.device)
        timesteps = scheduler.timesteps[-num_steps:]
        if start:
            scheduler.set_begin_index(len(scheduler.timesteps) - num_steps)
            latents = scheduler.add_noise(start.latents, noise, timesteps[:1].expand(len(noise)))
        for step, timestep in enumerate(timesteps):
            both = torch.cat([latents, latents])
            conditional, empty = self.predict(both, timestep.expand(len(both)), conditions).chunk(2)
            if guide:
                predict = functools.partial(self.predict, latents, timestep.expand(len(latents)))
                conditional = guide(step, conditional, predict)
            latents = scheduler.step(empty + guidance * (conditional - empty), timestep, latents).prev_sample
        return latents
