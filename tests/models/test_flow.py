"""Rectified flow in numbers: noise levels, noising, targets, and the two forms of the error."""

import math

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.models.flow import FlowDenoiser
from safety_experts.models.flux import DEV_SHIFT, Flux, FluxLayout
from safety_experts.models.sd3 import SD3, SD3Layout

LATENTS, NOISE = torch.tensor([2.0, 4.0]).view(2, 1, 1, 1), torch.tensor([10.0, -8.0]).view(2, 1, 1, 1)
TIMESTEPS = torch.tensor([249, 999])  # u = 0.25 and 1


class Still(FlowDenoiser):
    """Predicts a velocity of 6 everywhere."""

    def _velocity(self, noisy, sigmas, conditions):
        return torch.full_like(noisy, 6.0)


def test_noise_levels_follow_the_shift():
    # 3 · 0.25 / (1 + 2 · 0.25) = 0.5
    torch.testing.assert_close(Still(None, 3.0).sigmas(TIMESTEPS), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(Still(None, 1.0).sigmas(TIMESTEPS), torch.tensor([0.25, 1.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_those_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.flip(0)
    torch.testing.assert_close(Still(None, shift).sigmas(torch.arange(1000)), theirs, rtol=1e-5, atol=0)


def test_the_shift_of_flux_dev_is_that_of_its_schedule_at_1024_px():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.25], mu=1.15)
    assert math.log(DEV_SHIFT) == pytest.approx(1.15)
    ours = Still(None, DEV_SHIFT).sigmas(TIMESTEPS).flip(0)
    torch.testing.assert_close(ours, scheduler.sigmas[:2])


def test_noising_and_velocity():
    denoiser = Still(None, 3.0)
    noisy = denoiser.add_noise(LATENTS, NOISE, TIMESTEPS)
    assert noisy.flatten().tolist() == [6.0, -8.0]  # half way from 2 to 10; pure noise
    assert denoiser.target(LATENTS, NOISE, TIMESTEPS).flatten().tolist() == [8.0, -12.0]


def test_the_preconditioned_error_is_the_velocity_error_times_the_squared_noise_level():
    velocity, image = Still(None, 3.0), Still(None, 3.0, error="x0")
    noisy = velocity.add_noise(LATENTS, NOISE, TIMESTEPS)
    errors = [
        (denoiser.predict(noisy, TIMESTEPS, {}) - denoiser.target(LATENTS, NOISE, TIMESTEPS)).square().flatten()
        for denoiser in (velocity, image)
    ]
    assert errors[0].tolist() == [4.0, 324.0]  # (6 - 8)^2, (6 + 12)^2
    assert errors[1].tolist() == [1.0, 324.0]  # times 0.25, times 1


def tiny_transformer(family, layout):
    torch.manual_seed(0)
    transformer = family.build(layout).to_empty(device="cpu").eval()
    for parameter in transformer.state_dict().values():
        parameter.normal_(std=0.05)
    return transformer


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        (SD3(), SD3Layout(128, 1, 8, 8, 16, pos_embed_size=8)),
        (Flux(), FluxLayout(128, 1, 8, 8, 16, num_single_layers=1, has_guidance=True)),
    ],
)
def test_an_odd_size_is_the_even_one_that_goes_on_where_it_began(family, layout):
    denoiser = family.denoiser_class(tiny_transformer(family, layout), 3.0)
    conditions = {"hidden_states": torch.randn(1, 3, 8), "pooled": torch.randn(1, 8)}
    odd, timesteps = torch.randn(1, 16, 3, 5), torch.tensor([500])
    even = torch.cat([odd, odd[:, :, :1]], dim=2)
    even = torch.cat([even, even[..., :1]], dim=3)
    predicted = denoiser.predict(odd, timesteps, conditions)
    assert predicted.shape == odd.shape
    assert_close_at_scale(predicted, denoiser.predict(even, timesteps, conditions)[..., :3, :5])
