import math

import pytest
import torch
from safety_experts.training.beta import beta_at
from safety_experts.training.recipe import Recipe


def test_without_a_target_beta_is_the_recipes():
    assert beta_at(Recipe(beta=300.0), [{"error_margin": 1e-3}] * 9) == 300


def test_a_steady_margin_gets_the_wished_gradient_factor():
    recipe = Recipe(beta=50000.0, target_gradient_factor=0.2)
    beta = beta_at(recipe, [{"error_margin": 1e-3}] * 5)
    assert beta == pytest.approx(2 * math.log(4) / 1e-3)  # logit(0.8) = ln 4
    assert torch.sigmoid(torch.tensor(-beta / 2 * 1e-3)).item() == pytest.approx(0.2)


def test_a_fresh_expert_and_a_tiny_margin_get_the_recipes_beta_and_a_huge_one_a_thousandth():
    recipe = Recipe(beta=5000.0, target_gradient_factor=0.2)
    assert beta_at(recipe, []) == 5000
    assert beta_at(recipe, [{"error_margin": 0.0}]) == 5000
    assert beta_at(recipe, [{"error_margin": 1e-9}] * 3) == 5000
    assert beta_at(recipe, [{"error_margin": 1e9}] * 3) == 5


def test_older_margins_weigh_less():
    recipe = Recipe(beta=100.0, target_gradient_factor=0.2)
    margins = [1.0] * 100 + [2.0] * 100
    weights = [0.99 ** (199 - step) for step in range(200)]
    mean = sum(weight * margin for weight, margin in zip(weights, margins, strict=True)) / sum(weights)
    beta = beta_at(recipe, [{"error_margin": margin} for margin in margins])
    assert beta == pytest.approx(2 * math.log(4) / mean)


def test_a_run_follows_the_target_and_its_resumption_too(make_run, tmp_path):
    """Beta far too high for what is learnt: alone it saturates, with the helper the factor stays near its target."""
    from safety_experts.training.run_state import restore_state, save_state

    options = {"steps": 60, "learning_rate": 5e-3, "beta": 1e6, "caption_dropout_fraction": 0.0}
    alone = make_run(**options)
    helped, first, second = (make_run(**options, target_gradient_factor=0.3) for _ in range(3))
    for run in (alone, helped):
        while run.step < 60:
            run.take_step(lambda: False)

    def factor(run):
        # Of the pairs that are told apart: the others have a factor above a half whatever beta is.
        values = [r["gradient_factor"] for r in run.records[-30:] if r["rewards/accuracies"] == 1]
        assert len(values) >= 3
        return sum(values) / len(values)

    assert factor(alone) < 0.05
    assert 0.1 < factor(helped) < 0.45
    assert helped.records[0]["beta"] == 1e6 > helped.records[-1]["beta"]
    for _ in range(7):
        first.take_step(lambda: False)
    save_state(first, tmp_path / "a.resume", {})
    restore_state(second, tmp_path / "a.resume", {})
    assert second.take_step(lambda: False) == helped.records[7]


def test_margins_that_are_noise_give_way_to_the_contrast():
    recipe = Recipe(beta=20000.0, target_gradient_factor=0.2, leak_budget=0.1, held_out_fraction=0.1)
    noise = [{"error_margin": 0.01, "rewards/margins": sign, "beta": 100.0} for sign in (1.0, -1.0, 1.0, -1.0)]
    measured = [{**noise[0], "eval/contrast": 0.1}, *noise[1:]]
    assert beta_at(recipe, measured) == pytest.approx(2 * math.log(4) / 0.1)
    assert beta_at(recipe, noise) == pytest.approx(2 * math.log(4) / 0.01)  # no contrast is known
    shown = [{**record, "rewards/margins": 1.0 + 0.01 * n} for n, record in enumerate(measured)]
    assert beta_at(recipe, shown) == pytest.approx(2 * math.log(4) / 0.01)
