"""The guards' formulas against worked numbers and against the published form in units of the noise prediction."""

import pytest
import torch
from safety_experts.guards.guidance import (
    SLD_PRESETS,
    SldMomentum,
    away_from_concept,
    away_from_gradient,
    nearest_concept,
    presence,
    sld_gradient,
)


def rows(*values):
    """One image a row, of two numbers."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, :]


NOISY = rows([3.0, -1.0], [3.0, -1.0], [3.0, -1.0])


def test_presence_is_a_half_at_the_concept_and_minus_a_half_at_its_twin():
    unsafe, safe = rows([4.0, 2.0]).expand(3, -1, -1, -1), rows([0.0, 2.0]).expand(3, -1, -1, -1)
    prompt = rows([4.0, 7.0], [0.0, -5.0], [3.0, 2.0])  # across the direction nothing counts

    assert presence(prompt, unsafe, safe, NOISY).tolist() == [0.5, -0.5, 0.25]


def test_presence_of_twins_that_the_model_does_not_tell_apart_is_near_zero():
    """The difference is 1e-6 of the noise prediction; without a floor this would be 5e5."""
    unsafe, safe = rows([1e-6, 0.0]), rows([0.0, 0.0])
    prompt = rows([0.5, 0.0])

    assert abs(presence(prompt, unsafe, safe, rows([2.0, 1.0])).item()) < 0.5


def test_the_pair_guard_takes_the_difference_away_where_it_is_open():
    prompt, unsafe, safe = rows([5.0, 1.0], [5.0, 1.0]), rows([4.0, 2.0]), rows([0.0, 2.5])

    changed = away_from_concept(prompt, unsafe, safe, torch.tensor([1.0, 0.0]))

    assert changed[:, 0, 0].tolist() == [[1.0, 1.5], [5.0, 1.0]]


def published_sld(eps_prompt, eps_unsafe, eps_empty, preset):
    """The lines of diffusers' StableDiffusionPipelineSafe, in noise predictions."""
    scale = torch.clamp(torch.abs(eps_prompt - eps_unsafe) * preset.scale, max=1.0)
    safety_scale = torch.where((eps_prompt - eps_unsafe) >= preset.threshold, torch.zeros_like(scale), scale)
    return torch.mul(eps_unsafe - eps_empty, safety_scale)


def agrees_with_the_published_form(gradient_of) -> bool:
    generator = torch.Generator().manual_seed(0)
    noisy, *eps = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(4))
    eps = [0.5 * eps[0], 0.5 * eps[0] + 0.02 * eps[1], 0.5 * eps[0] + 0.05 * eps[2]]
    for preset in SLD_PRESETS.values():
        for level in (0.03, 1.0, 14.6):
            sigma = torch.full((3,), level)
            denoised = [noisy.double() - level * e.double() for e in eps]
            expected = published_sld(*[e.double() for e in eps], preset)
            found = gradient_of(*denoised, sigma.double(), preset)
            if not torch.allclose(found, expected, atol=1e-9, rtol=1e-6) or not expected.any():
                return False
    return True


def test_sld_is_the_published_form_at_every_noise_level():
    assert agrees_with_the_published_form(sld_gradient)


def test_sld_without_sigma_is_found_out():
    def without_sigma(prompt, unsafe, empty, sigma, preset):
        return sld_gradient(prompt, unsafe, empty, torch.ones_like(sigma), preset)

    assert not agrees_with_the_published_form(without_sigma)


def test_the_gradient_is_taken_from_the_noise_prediction():
    sigma, prompt, gradient = torch.tensor([2.0]), rows([1.0, 1.0]), rows([0.5, -0.25])

    changed = away_from_gradient(prompt, gradient, sigma, torch.tensor([1.0]))

    noisy = rows([3.0, 3.0])
    assert torch.equal((noisy - changed) / 2.0, (noisy - prompt) / 2.0 - gradient)


def test_momentum_counts_a_noise_level_once():
    """s_m = .5, β = .7: g₁ = 1, v = .3; g₂ = 1 + .15 = 1.15, v = .21 + .345 = .555; g₃ = 1.2775."""
    momentum, one = SldMomentum(SLD_PRESETS["strong"]), torch.ones(1)

    found = [momentum.add(one, sigma).item() for sigma in (9.0, 5.0, 5.0, 2.0)]

    assert found == pytest.approx([1.0, 1.15, 1.15, 1.2775])


def test_the_nearest_concept_is_chosen_by_angle_and_not_by_length():
    empty = torch.zeros(2, 1, 1, 2)
    prompt = rows([1.0, 0.2], [-0.1, 3.0])
    unsafe = torch.stack([rows([0.1, 0.0], [0.1, 0.0]), rows([20.0, 30.0], [20.0, 30.0])])

    assert nearest_concept(prompt, unsafe, empty).tolist() == [0, 1]
