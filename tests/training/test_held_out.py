import math
import re

import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.training.held_out import split_pairs
from safety_experts.training.lora import adapter_off
from safety_experts.training.objectives import OBJECTIVES
from safety_experts.training.recipe import Recipe, make_recipe
from safety_experts.training.run_state import restore_state, save_state
from tiny_models import MemoryCache, make_pair

WATCHED = {"held_out_fraction": 0.34, "evaluate_steps": 2}


class Bright(MemoryCache):
    """Chosen images are bright, rejected ones dark: a preference that can be learnt at every noise level."""

    def latents(self, pair, *, flipped=False):
        return torch.full((4, 4, 4), 1.5), torch.full((4, 4, 4), -1.5)


def finish(run):
    while run.step < run.recipe.steps and not run.stop_reason:
        run.take_step(lambda: False)
    return run


def test_held_out_pairs_are_a_seeded_fraction_and_never_trained_on():
    pairs = [make_pair(number) for number in range(20)]
    trained, held_out = split_pairs(pairs, Recipe(held_out_fraction=0.25))
    assert len(held_out) == 5 and sorted(p.id for p in trained + held_out) == sorted(p.id for p in pairs)
    assert split_pairs(pairs, Recipe(held_out_fraction=0.25)) == (trained, held_out)
    assert split_pairs(pairs, Recipe(held_out_fraction=0.25, seed=1))[1] != held_out
    assert split_pairs(pairs, Recipe())[1] == []
    assert [len(part) for part in split_pairs(pairs[:2], Recipe(held_out_fraction=0.9))] == [1, 1]
    assert [len(part) for part in split_pairs(pairs[:2], Recipe(held_out_fraction=0.01))] == [1, 1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_untrained_model_measures_what_its_objective_says(make_run, name):
    run = make_run(**WATCHED, objective=name)
    measured = run.held_out.measure(run.policy)
    assert measured == run.held_out.measure(run.policy, is_untrained=True)
    expected = OBJECTIVES[name].untrained_loss(OBJECTIVES[name].parameters())
    if expected is not None:
        assert measured["eval/loss"] == pytest.approx(expected, abs=1e-6)
    assert measured["eval/drift"] == 0 == measured["eval/rewards/margins"]


def test_the_model_without_its_lora_is_measured_whatever_the_lora_is(make_run):
    run = make_run(**WATCHED)
    fresh = run.held_out.measure(run.policy, is_untrained=True)
    for _ in range(3):
        run.take_step(lambda: False)
    assert run.held_out.measure(run.policy)["eval/drift"] > 0
    assert run.held_out.measure(run.policy, is_untrained=True) == fresh == run.untrained


def test_without_a_preference_loss_the_denoising_error_is_watched(make_run):
    run = make_run(Bright(), **WATCHED, objective={}, sft_weight=1.0, steps=30, learning_rate=1e-2, patience=9, rank=4)
    finish(run)
    measured = [record["eval/loss"] for record in run.records if "eval/loss" in record]
    assert run.untrained["eval/loss"] > measured[0] > min(measured)
    assert measured[run.best_step // 2 - 1] == min(measured) and run.finish() == run.best_step > 2


def test_measuring_changes_neither_weights_nor_the_run(make_run):
    watched = finish(make_run(**WATCHED))
    blind = finish(make_run(**{**WATCHED, "evaluate_steps": 1000}))
    assert [r["loss"] for r in watched.records] == [r["loss"] for r in blind.records]
    assert ["eval/loss" in record for record in watched.records] == [False, True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("dspo", "mapo")])
def test_patience_keeps_the_best_trained_weights_whatever_the_objective_starts_from(make_run, name):
    """hinge starts at 1, dmpo at 1.61, safe-dpo at 1.31: all of them above ln 2, and all of them get better here."""
    options = {"objective": name, "beta": 50.0, "steps": 40, "learning_rate": 1e-2, "rank": 4, "patience": 2}
    run = finish(make_run(Bright(), **WATCHED, **options, last_timestep=600))
    measured = {i + 1: record["eval/loss"] for i, record in enumerate(run.records) if "eval/loss" in record}
    best = min(measured, key=measured.get)
    assert measured[best] < run.untrained["eval/loss"]
    assert run.finish() == best
    assert any(value.any() for key, value in run.parameters.items() if key.endswith(".up"))
    assert run.held_out.measure(run.policy)["eval/loss"] == pytest.approx(measured[best], rel=1e-4)


def test_a_run_that_never_gets_better_ends_without_an_expert(make_run):
    # Without any relation between a pair's images and its prompt, held-out pairs get worse at once.
    run = finish(make_run(**WATCHED, steps=200, learning_rate=2e-2, patience=2, beta=50000.0))
    assert run.stop_reason == "no better held-out loss in 2 measurements" and run.step < 200
    assert min(record.get("eval/loss", 1.0) for record in run.records) > run.untrained["eval/loss"]
    assert run.finish() == 0


def test_a_run_stopped_before_its_first_measurement_is_measured(make_run):
    run = make_run(Bright(), **{**WATCHED, "evaluate_steps": 50}, patience=3, learning_rate=1e-2, beta=50.0, rank=4)
    for _ in range(4):
        run.take_step(lambda: False)
    assert not any("eval/loss" in record for record in run.records)
    assert run.finish() == 4 and "eval/loss" in run.records[-1]


def test_drift_beyond_the_limit_ends_the_run(make_run):
    run = finish(make_run(**WATCHED, steps=100, learning_rate=2e-2, max_drift=1e-3))
    assert "passed max_drift" in run.stop_reason
    assert run.finish() < run.step
    assert run.held_out.measure(run.policy)["eval/drift"] <= 1e-3


def test_a_chosen_error_that_rises_over_the_references_ends_the_run(make_run):
    """SafeDPO exchanges the images of a pair that is labelled the wrong way round, so the chosen ones get worse."""

    wrong = [make_pair(number, chosen_unsafe=True, rejected_unsafe=False) for number in range(6)]
    options = {"objective": "safe-dpo", "beta": 500.0, "steps": 100, "learning_rate": 3e-2, "last_timestep": 600}
    run = finish(make_run(Bright(), wrong, **WATCHED, **options, rank=4, max_chosen_increase=0.03))
    assert re.fullmatch(r"chosen_increase 0\.\d+ passed max_chosen_increase", run.stop_reason)
    assert run.finish() < run.step < 100
    assert run.held_out.measure(run.policy)["eval/chosen_increase"] <= 0.03


def test_the_chosen_increase_is_the_ratio_of_the_errors(make_run):
    run = make_run(**WATCHED)
    for _ in range(5):
        run.take_step(lambda: False)
    recipe, plan = run.held_out.recipe, run.held_out.plan
    errors = {"policy": 0.0, "reference": 0.0}
    for number in range(run.held_out.num_batches):
        batch = plan.batch(number)
        conditions = plan.cache.conditions(batch.prompts)
        noisy = run.policy.denoiser.add_noise(batch.chosen, batch.noise, batch.timesteps)
        with torch.no_grad():
            policy = run.policy.denoiser.predict(noisy, batch.timesteps, conditions)
            with adapter_off(run.policy.model):
                reference = run.policy.denoiser.predict(noisy, batch.timesteps, conditions)
        errors["policy"] += (policy - batch.noise).square().mean().item()
        errors["reference"] += (reference - batch.noise).square().mean().item()
    measured = run.held_out.measure(run.policy)["eval/chosen_increase"]
    assert measured == pytest.approx(errors["policy"] / errors["reference"] - 1, abs=1e-5)
    assert measured != 0 and recipe.caption_dropout_fraction == 0


def test_a_resumed_run_remembers_its_best(make_run, tmp_path):
    options = {**WATCHED, "steps": 12, "learning_rate": 5e-3, "patience": 9, "ema_decay": 0.3}
    straight = finish(make_run(**options))
    first = make_run(**options)
    for _ in range(7):
        first.take_step(lambda: False)
    save_state(first, tmp_path / "a.resume", {})
    second = make_run(**options)
    restore_state(second, tmp_path / "a.resume", {})
    finish(second)
    assert second.best_step == straight.best_step
    for name, value in straight.best.items():
        assert torch.equal(value, second.best[name])


def test_watching_without_held_out_pairs_is_refused():
    with pytest.raises(InputError, match="set held_out_fraction above 0"):
        make_recipe({"patience": 3}, source="test")


def test_several_sizes_can_be_held_out(make_run):
    cache = MemoryCache({"pair0": (4, 8), "pair3": (4, 8)})
    run = make_run(cache, **WATCHED)
    assert math.isfinite(finish(run).records[-1]["eval/loss"])
