"""A ComfyUI model behind the library's Denoiser: noised, conditioned and called exactly as when it draws."""

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_sampling
import comfy.sample
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ...models.denoiser import SAMPLE_GUIDANCE, SAMPLE_STEPS, Conditions, FlowError, StartImage
from ...models.noise_schedule import NUM_TIMESTEPS
from . import block_checkpoint, kernels, packed, refusals
from .conditions import condition_of, group_rows, rows_of


class NativeDenoiser:
    """What a trainer needs of a MODEL. Latents are [b, c, h, w] or [b, c, 1, h, w], in the model's own scale.

    Predictions are the raw output of the network, so an error is measured in the model's own space (noise, v or
    velocity) and beta means what it means on the path by checkpoint.

    Args:
        patcher: ComfyUI's ModelPatcher, loaded on its device whenever `predict` is called.
        checkpoint_blocks: keep only the inputs of each block for the backward pass; always done where a model writes
            into its own activations, or where a part of it is in RAM.
        flow_error: "velocity", or "x0": flow models compare the images that follow (see models/flow.py).
    """

    def __init__(self, patcher, checkpoint_blocks: bool, flow_error: FlowError = "velocity"):
        self.patcher, self.flow_error = patcher, flow_error
        self.model: Any = patcher.model
        diffusion_model = self.model.diffusion_model
        self._checkpoints = checkpoint_blocks or not block_checkpoint.can_do_without(diffusion_model)
        self._blocks = block_checkpoint.blocks_of(diffusion_model)
        self._is_gguf = packed.is_gguf(patcher)
        dtype = self.model.get_dtype_inference()
        self.autocast_dtype = dtype if dtype in (torch.float16, torch.bfloat16) else None

    @property
    def sampling(self) -> Any:
        return self.model.model_sampling

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels [b] of timesteps [b] in 0..999, wherever in its own table the model has them."""
        levels = self.sampling.sigmas
        return levels.to(timesteps.device)[(timesteps + 1) * len(levels) // NUM_TIMESTEPS - 1]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.sampling.noise_scaling(_spread(self.sigmas(timesteps), latents), noise, latents, False)

    def pure_noise(self, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = _spread(self.sigmas(timesteps), noise)
        return self.sampling.noise_scaling(sigmas, noise, torch.zeros_like(noise), True)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the output that would denoise to `latents` exactly.

        Every model_sampling's `calculate_denoised` is a line in the output, so two points of it tell the inverse.
        """
        if self._compares_images:
            return latents
        noisy = self.add_noise(latents, noise, timesteps).double()
        sigmas, zero = self.sigmas(timesteps).double(), torch.zeros_like(noisy)
        start = self.sampling.calculate_denoised(sigmas, zero, noisy)
        slope = self.sampling.calculate_denoised(sigmas, zero + 1, noisy) - start
        return ((latents.double() - start) / slope).float()

    @property
    def _compares_images(self) -> bool:
        return self.flow_error == "x0" and isinstance(self.sampling, comfy.model_sampling.CONST)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's output [b, …] float32; conditions are b rows, which may differ in length."""
        rows = rows_of(conditions, len(noisy))
        sigmas = self.sigmas(timesteps)
        # Without checkpoints autograd would keep all the weights that came from RAM, or were unpacked.
        blocks = self._blocks if self._checkpoints or self._is_gguf or self.model.model_lowvram else []
        # A checkpointed block differentiates what it was given: something it is given has to ask for it.
        noisy = noisy.detach().requires_grad_(torch.is_grad_enabled())
        parts: list[Tensor | None] = [None] * len(noisy)
        with (
            refusals.clip_named(),
            kernels.training_mode(),
            block_checkpoint.checkpointed(blocks, kernels.training_mode, copies_all=self._is_gguf),
            raw_output(self.sampling, raw=not self._compares_images),
        ):
            for group in group_rows(self.model, noisy, rows):
                whole = len(group.rows) == len(noisy)
                out = self.model.apply_model(
                    noisy if whole else noisy[group.rows],
                    sigmas if whole else sigmas[group.rows],
                    transformer_options={"optimized_attention_override": plain_attention},
                    **group.arguments,
                ).float()
                if whole:
                    return out
                for place, part in zip(group.rows, out, strict=True):
                    parts[place] = part
        return torch.stack([part for part in parts if part is not None])

    def sample(
        self,
        noise: Tensor,
        conditions: Conditions,
        num_steps: int = SAMPLE_STEPS,
        guidance: float = SAMPLE_GUIDANCE,
        *,
        start: StartImage | None = None,
    ) -> Tensor:
        """Return latents [b, …] as the stock KSampler draws them: rows of the prompts, then of the empty prompt."""
        is_flow = isinstance(self.sampling, comfy.model_sampling.CONST)
        sampler, scheduler = ("euler", "simple") if is_flow else ("dpmpp_2m", "normal")
        cfg = 1.0 if _is_distilled(self.model) else guidance
        rows = rows_of(conditions, 2 * len(noise))
        begin = torch.zeros_like(noise) if start is None else self.model.process_latent_out(start.latents)
        drawn = []
        for index, (one_noise, one_begin) in enumerate(zip(noise.split(1), begin.split(1), strict=True)):
            with kernels.uninterrupted():
                latents = comfy.sample.sample(
                    self.patcher,
                    one_noise.cpu(),
                    num_steps,
                    cfg,
                    sampler,
                    scheduler,
                    condition_of(rows[index]),
                    condition_of(rows[len(noise) + index]),
                    one_begin.cpu(),
                    denoise=start.denoise if start else 1.0,
                    disable_pbar=True,
                    seed=0,
                )
            drawn.append(self.model.process_latent_in(latents.to(noise.device)))
        return torch.cat(drawn)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _is_distilled(model: Any) -> bool:
    """Say whether the guidance scale is an input, as in FLUX.1-dev: it draws without classifier-free guidance."""
    return bool(model.model_config.unet_config.get("guidance_embed"))


def plain_attention(function, *args, **kwargs):
    """torch's own attention; sage, flash and int8 attention have no backward pass."""
    return attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def raw_output(sampling, *, raw: bool) -> Iterator[None]:
    """Inside, `apply_model` returns what the network says, not the image that follows from it."""
    if not raw:
        yield
        return
    sampling.calculate_denoised = lambda sigma, output, noisy: output
    try:
        yield
    finally:
        del sampling.calculate_denoised
