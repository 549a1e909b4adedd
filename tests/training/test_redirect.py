"""Redirect: worked numbers of the reference, a fresh adapter, invariance, the stop rule, and what resuming keeps."""

import math
from types import SimpleNamespace

import pytest
import torch
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.training.batches import BatchPlan
from safety_experts.training.cautions import cautions
from safety_experts.training.recipe import Recipe, load_recipe, make_recipe
from safety_experts.training.redirect import (
    LEAK,
    LEAK_WEIGHT,
    RESIDUAL,
    Balance,
    barrier_weight,
    dual_weight,
    leak_weight_at,
    relative_change,
    residual_target,
    retained_shares,
    smoothed,
)
from safety_experts.training.reference_bank import ReferenceBank
from safety_experts.training.retained import PROMPTS_PER_GROUP, read_retained, retained_prompts
from safety_experts.training.run_state import restore_state, save_state
from safety_experts.training.stop_rules import is_kept, learning_rate_factor, shortfall, spent_budget, stop_reason
from small_training import SmallTraining
from tiny_models import MemoryCache, make_pair

REDIRECT = {
    "redirect": True,
    "objective": {},
    "leak_budget": 0.003,
    "held_out_fraction": 0.34,
    "evaluate_steps": 2,
    "retain_fraction": 0.5,
    "caption_dropout_fraction": 0.0,
}
RETAINED = {"hate": ("stripes 1", "stripes 2"), "given": ("a tree",)}


def train(run, steps=None):
    while run.step < (steps or run.recipe.steps):
        run.take_step(lambda: False)
    return run


def weights(run):
    return {name: value.detach().clone() for name, value in run.parameters.items()}


# --- worked numbers (constrained §17.7, §9) ---


def test_the_loss_is_the_worked_example():
    prediction, teacher = torch.full((2, 4, 4, 4), 0.3), torch.zeros(2, 4, 4, 4)
    residual = relative_change(prediction, teacher, 1.0)
    assert float(residual) == pytest.approx(0.09)
    balance = Balance(contrast=1.0, leak_weight=2.0, leak_budget=0.02)
    assert float(balance.loss(residual, torch.tensor(0.01))) == pytest.approx(0.36333, abs=1e-5)


def test_predictions_ten_times_as_large_give_the_same_loss():
    policy, teacher, kept = (torch.randn(2, 4, 4, 4) for _ in range(3))

    def loss(scale):
        contrast = float((policy - teacher).square().mean() * scale**2 / 3)
        balance = Balance(contrast, leak_weight=0.1, leak_budget=0.003)
        residual = relative_change(policy * scale, teacher * scale, contrast)
        return float(balance.loss(residual, relative_change(kept * scale, policy * scale, contrast)))

    assert loss(10.0) == pytest.approx(loss(1.0), rel=1e-5)


def test_the_rules_of_lambda_are_the_worked_examples():
    assert dual_weight(1.0, 0.5, 0.2) == pytest.approx(1.2214, abs=1e-4)
    assert dual_weight(1.0, -1.0, -1.0) == pytest.approx(0.9048, abs=1e-4)
    assert dual_weight(900.0, 1.0, -1.0) == 1e3 and dual_weight(1e-3, -1.0, 1.0) == 1e-3
    assert barrier_weight(0.1, 0.8) == pytest.approx(0.5)
    assert barrier_weight(0.1, 1.2) == pytest.approx(5.0)


def test_the_target_follows_the_guidance():
    assert residual_target(3.0, kept=0.5) == pytest.approx(0.02778, abs=1e-5)
    assert residual_target(7.5, kept=0.5) == pytest.approx(0.00444, abs=1e-5)
    # Of a third, not of the reference's half, of which a part of the pictures shows what is to go.
    assert residual_target(3.0) == pytest.approx(0.01235, abs=1e-5)
    assert residual_target(7.5) == pytest.approx(0.00198, abs=1e-5)
    assert residual_target(0.0) == residual_target(1.0) == pytest.approx(1 / 9)


def test_the_smoothed_leak_starts_without_a_bias():
    assert smoothed([0.4]) == pytest.approx([0.4])
    assert smoothed([0.4, 0.8])[1] == pytest.approx((0.09 * 0.4 + 0.1 * 0.8) / 0.19)


def test_lambda_is_a_function_of_the_records():
    recipe = Recipe(**{**REDIRECT, "leak_budget": 0.02, "leak_control": "dual", "leak_weight": 1.0})
    assert leak_weight_at(recipe, []) == 1.0
    records = [{LEAK: 0.03, LEAK_WEIGHT: 1.0}]
    assert leak_weight_at(recipe, records) == pytest.approx(math.exp(0.1 * 0.5))
    constant, barrier = (recipe.model_copy(update={"leak_control": name}) for name in ("constant", "barrier"))
    assert leak_weight_at(constant, records) == 1.0
    assert leak_weight_at(barrier, [{LEAK: 0.016, LEAK_WEIGHT: 1.0}]) == pytest.approx(5.0)


# --- stop rule ---


def measured(residual, leak, worst=None):
    return {
        "eval/loss": 1.0,
        "eval/drift": 0.0,
        "eval/chosen_increase": 0.0,
        "eval/residual": residual,
        "eval/leak": leak,
        "eval/worst_leak": leak if worst is None else worst,
        "eval/leak/hate": leak if worst is None else worst,
    }


def test_the_feasible_minimum_wins_over_a_lower_infeasible_one():
    recipe = Recipe(**REDIRECT, guidance=3.0)
    records, best, best_step = [], 1.0, 0
    for step, (residual, leak) in enumerate([(0.5, 0.001), (0.01, 0.004), (0.2, 0.002), (0.3, 0.001)], start=1):
        records.append(measured(residual, leak))
        if is_kept(records[-1], best, recipe, best_step=best_step):
            best, best_step = residual, step
        assert stop_reason(records, best_step, recipe) is None
    assert best_step == 3
    assert shortfall(records, best_step, recipe) == ("residual 0.2, target 0.0123: raise rank, steps or leak_budget")
    records.append(measured(0.012, 0.003))
    assert is_kept(records[-1], best, recipe, best_step=best_step)
    assert "target is reached" in stop_reason(records, 5, recipe)
    assert shortfall(records, 5, recipe) is None


def test_without_a_feasible_measurement_the_leak_is_said_to_block():
    recipe = Recipe(**REDIRECT)
    records = [measured(0.01, 0.01), measured(0.01, 0.005)]
    assert not any(is_kept(record, 1.0, recipe, best_step=0) for record in records)
    assert shortfall(records, 0, recipe).startswith(
        "the leak blocks: least 0.005 on average and 0.005 on hate prompts, budget 0.003 and 0.009"
    )


def test_the_budget_is_of_the_mean_and_the_worst_group_may_leak_three_times_as_much():
    recipe = Recipe(**REDIRECT)
    assert is_kept(measured(0.01, 0.003, worst=0.009), 1.0, recipe, best_step=0)
    assert not is_kept(measured(0.01, 0.003, worst=0.0091), 1.0, recipe, best_step=0)
    assert spent_budget(measured(0.01, 0.0015, worst=0.018), recipe) == pytest.approx(2.0)
    assert spent_budget({}, Recipe(held_out_fraction=0.2)) == 0.0


def test_steps_get_smaller_only_where_the_target_is_reached_over_budget():
    recipe = Recipe(**REDIRECT, guidance=3.0)
    over, early, kept = measured(0.012, 0.01), measured(0.2, 0.01), measured(0.012, 0.001)
    assert learning_rate_factor(recipe, [early, {"loss": 1.0}, kept]) == 1.0
    assert learning_rate_factor(recipe, [over, early, over]) == pytest.approx(0.49)
    assert learning_rate_factor(recipe, [over] * 50) == 0.05
    assert learning_rate_factor(recipe.model_copy(update={"redirect": False}), [over]) == 1.0


def test_retained_rows_go_where_the_leak_is():
    recipe = Recipe(**{**REDIRECT, "retain_by_leak": 0.75})
    assert retained_shares(recipe, [], ["hate", "given"]) == {"hate": 0.5, "given": 0.5}
    records = [{"eval/leak": 0.02, "eval/leak/hate": 0.03, "eval/leak/given": 0.01, "eval/leak/safe": 9.0}, {}]
    assert retained_shares(recipe, records, ["hate", "given"]) == pytest.approx({"hate": 0.6875, "given": 0.3125})
    assert retained_shares(recipe, records, []) == {}


def test_shares_decide_what_is_drawn_and_equal_ones_change_nothing():
    plan = BatchPlan([make_pair(0), make_pair(1)], MemoryCache(), Recipe(**REDIRECT, batch_size=2), RETAINED)
    equal = dict.fromkeys(RETAINED, 1 / len(RETAINED))
    assert all(plan.batch(n, equal).anchor_prompts == plan.batch(n).anchor_prompts for n in range(50))
    shares = {"hate": 0.9, "given": 0.1}
    prompts = [prompt for number in range(400) for prompt in plan.batch(number, shares).anchor_prompts]
    hate, given = (sum(prompt in RETAINED[name] for prompt in prompts) for name in ("hate", "given"))
    assert hate / (hate + given) == pytest.approx(0.9, abs=0.05)


# --- in a run ---


@pytest.mark.parametrize("options", [{}, {"objective": "bounded", "beta": 10.0}])
def test_a_fresh_adapter_has_residual_one_and_no_leak(make_run, options):
    run = make_run(**{**REDIRECT, **options}, retained=RETAINED)
    for found in (run.held_out.measure(run.policy), run.held_out.measure(run.policy, is_untrained=True)):
        assert found["eval/residual"] == 1.0
        leaks = {name: value for name, value in found.items() if name.startswith(("eval/leak", "eval/worst"))}
        assert set(leaks.values()) == {0.0}
        assert {name.removeprefix("eval/leak/") for name in leaks} == {
            "eval/leak",
            "eval/worst_leak",
            "safe",
            "empty",
            *RETAINED,
        }
    first = run.take_step(lambda: False)
    assert first[LEAK] == 0.0 and first[RESIDUAL] > 0 and first[LEAK_WEIGHT] == 0.1


def test_the_unsafe_prompt_learns_to_act_as_the_safe_one(make_run):
    pairs = [make_pair(number, prompt="with thorns", safe_prompt="plain") for number in range(6)]
    options = {"steps": 40, "learning_rate": 5e-3, "rank": 4, "evaluate_steps": 5, "leak_budget": 1.0}
    run = make_run(run_pairs=pairs, **{**REDIRECT, **options, "residual_target": 0.3}, retained=RETAINED)
    while run.step < run.recipe.steps and not run.stop_reason:
        run.take_step(lambda: False)
    assert "reached within the leak budget" in run.stop_reason and run.finish() == run.step
    kept = run.held_out.measure(run.policy)
    assert kept["eval/residual"] <= 0.3 and kept["eval/leak"] <= 1.0
    assert kept["eval/worst_leak"] == max(value for name, value in kept.items() if name.startswith("eval/leak/"))
    mean = sum(part * kept[f"eval/leak/{name}"] for name, part in run.held_out.group_weights.items())
    assert kept["eval/leak"] == mean and sum(run.held_out.group_weights.values()) == pytest.approx(1.0)


def test_measurements_spread_their_noise_levels_evenly(make_run):
    run = make_run(**REDIRECT, retained=RETAINED)
    batches = [run.held_out._stratified(run.held_out.plan.batch(n), n) for n in range(run.held_out.num_batches)]
    timesteps = sorted(int(t) for batch, _ in batches for t in batch.timesteps)
    gap = 1000 / len(timesteps)
    assert all(abs(t - index * gap) <= 1 for index, t in enumerate(timesteps))
    assert {owner for _, owners in batches for owner in owners} == {"safe", "empty", *RETAINED}


def test_half_of_the_retained_rows_are_of_other_categories(make_run):
    plan = BatchPlan([make_pair(0), make_pair(1)], MemoryCache(), Recipe(**REDIRECT, batch_size=2), RETAINED)
    prompts = [prompt for number in range(400) for prompt in plan.batch(number).anchor_prompts]
    others = [prompt for prompt in prompts if prompt in (*RETAINED["hate"], *RETAINED["given"])]
    assert len(others) / len(prompts) == pytest.approx(0.5, abs=0.06)
    assert others.count("a tree") / len(others) == pytest.approx(0.5, abs=0.08)
    without = BatchPlan(plan.pairs, MemoryCache(), plan.recipe)
    assert torch.equal(without.batch(3).noise, plan.batch(3).noise)


@pytest.mark.parametrize("options", [{}, {"objective": "bounded", "beta": 10.0}])
def test_kept_reference_predictions_change_nothing(make_run, options):
    values = {**REDIRECT, "reference_epochs": 1, "evaluate_steps": 100, **options}
    without = train(make_run(**values, retained=RETAINED))
    kept = make_run(**values, retained=RETAINED)
    kept.bank = ReferenceBank()
    train(kept)
    assert all(torch.equal(value, weights(kept)[name]) for name, value in weights(without).items())
    assert kept.records == without.records


@pytest.mark.parametrize(
    ("control", "stop_at"),
    [("dual", 3)]
    + [
        pytest.param(control, stop_at, marks=pytest.mark.slow)
        for control, stop_at in [("constant", 1), ("constant", 3), ("dual", 1), ("barrier", 1), ("barrier", 3)]
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(make_run, tmp_path, control, stop_at):
    options = {**REDIRECT, "leak_control": control, "learning_rate": 1e-2, "residual_target": 1e-6}
    options |= {"retain_by_leak": 0.75}
    straight = train(make_run(**options, retained=RETAINED))
    first = train(make_run(**options, retained=RETAINED), stop_at)
    save_state(first, tmp_path / "a.resume", {})
    second = make_run(**options, retained=RETAINED)
    restore_state(second, tmp_path / "a.resume", {})
    assert second.untrained == straight.untrained
    train(second)
    assert second.records == straight.records and second.best_step == straight.best_step
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(straight).items())
    if control != "constant":
        assert len({record[LEAK_WEIGHT] for record in straight.records}) > 1


def test_prompts_that_the_base_does_not_separate_are_refused(make_run):
    twins = [make_pair(number, safe_prompt=f"a red circle with thorns {number}") for number in range(6)]
    with pytest.raises(InputError, match="the base model does not separate these prompts"):
        make_run(run_pairs=twins, **REDIRECT).take_step(lambda: False)


# --- recipe, prompts, files ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"redirect": True}, "redirect needs a leak_budget"),
        ({"retain_by_leak": 0.5}, "retain_by_leak goes by measured leaks"),
        ({"redirect": True, "leak_budget": 0.1}, "leak_budget watch held-out pairs"),
        ({**REDIRECT, "anchor_weight": 1.0}, "redirect has terms of its own"),
        ({**REDIRECT, "anchor_samples": "noise"}, "knows no prompts to retain"),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        make_recipe(values, source="test")


def test_prompts_of_a_file_and_of_a_dataset_are_a_group_each(tmp_path):
    (tmp_path / "words.txt").write_text("a tree\n\na house\na tree\n")
    assert read_retained(tmp_path / "words.txt") == {"words": ("a tree", "a house")}
    (tmp_path / "more.csv").write_text("prompt,safe_prompt,category\nan unsafe one,a safe one,hate\n")
    assert read_retained(tmp_path / "more.csv") == {"more": ("an unsafe one", "a safe one")}
    small = SmallTraining.create(tmp_path)
    assert len(read_retained(small.dataset.folder)["pairs"]) == 8
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompts to retain"):
        read_retained(tmp_path / "empty.txt")


def test_other_categories_of_the_dataset_are_retained_by_themselves():
    pairs = [make_pair(n, prompt=f"p{n}", categories=(("hate", "violence")[n % 2],)) for n in range(600)]
    dataset = SimpleNamespace(pairs=pairs)
    recipe, own = Recipe(**REDIRECT), [pair for pair in pairs if "violence" in pair.categories]
    found = retained_prompts(dataset, own, "violence", recipe, {"given": ("p1", "a tree")})
    assert sorted(found) == ["given", "hate"] and found["given"] == ("a tree",)  # p1 is trained on
    assert len(found["hate"]) == PROMPTS_PER_GROUP
    assert all(int(prompt[1:]) % 2 == 0 for prompt in found["hate"])
    assert retained_prompts(dataset, own, None, recipe, {}) == {}
    with pytest.raises(InputError, match="every prompt of given is trained on"):
        retained_prompts(dataset, own, "violence", recipe, {"given": ("p1",)})
    with pytest.raises(InputError, match="retain_fraction 0"):
        retained_prompts(dataset, own, "violence", Recipe(), {"given": ("p1",)})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


SHORT = ("steps=4", "evaluate_steps=2", "held_out_fraction=0.5", "learning_rate=0.001")


def of_auto(*overrides):
    wanted = ("redirect=true", "objective={}", "anchor_weight=0", "sft_weight=0", "retain_fraction=0.5")
    return (*wanted, "leak_budget=0.003", *SHORT, *overrides)


def test_a_file_says_what_its_expert_falls_short_of(small, tmp_path):
    out = tmp_path / "short.safetensors"
    result = small.train(out, *of_auto("leak_budget=1000", "residual_target=0.0001"))
    assert result.shortfall.startswith("residual ") and "target 0.0001" in result.shortfall
    assert result.expert.info.trained.shortfall == result.shortfall
    assert {"eval/residual", "eval/leak", RESIDUAL} <= result.expert.info.trained.metrics.keys()


def test_weights_beyond_the_budget_are_no_expert(small, tmp_path):
    out = tmp_path / "none.safetensors"
    with pytest.raises(SafetyExpertsError, match=r"no expert was saved: the leak blocks"):
        small.train(out, *of_auto("leak_budget=1e-12", "learning_rate=0.05"))
    assert not out.exists()


# --- cautions ---


@pytest.mark.parametrize(
    ("recipe", "overrides", "guidance", "said"),
    [
        ("duo", (), 7.5, "trains the empty prompt only"),
        ("duo", (), 1.0, None),
        ("alignguard", ("target_gradient_factor=0.2",), 7.5, "a smaller beta alone does more damage"),
        ("sd15", ("target_gradient_factor=0.2",), 7.5, None),
        ("redirect", (), 7.5, None),
        ("redirect", ("retain_fraction=0",), 7.5, "retain_fraction is 0"),
    ],
)
def test_what_is_known_to_go_wrong_is_said(recipe, overrides, guidance, said):
    found = cautions(load_recipe(recipe, overrides), guidance)
    assert len(found) == bool(said) and (not said or said in found[0])
