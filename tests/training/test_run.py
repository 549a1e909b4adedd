import math

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.training.batches import BatchPlan
from safety_experts.training.held_out import HeldOut
from safety_experts.training.lora import adapter_off, attach_lora, lora_modules, lora_parameters, read_layers
from safety_experts.training.policy import LoraPolicy
from safety_experts.training.recipe import Recipe, load_recipe, shipped_recipes
from safety_experts.training.run import TrainingRun, learning_rate_at
from safety_experts.training.run_state import restore_state, save_state
from safety_experts.training.step_loss import batch_loss
from tiny_models import MemoryCache, make_pair, tiny_unet


def go_on():
    return False


def weights_of(run):
    return {name: value.detach().clone() for name, value in run.parameters.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def train(run, steps=None):
    for _ in range(steps or run.recipe.steps - run.step):
        run.take_step(go_on)
    return run


def test_a_fresh_expert_has_loss_ln_2(make_run):
    metrics = make_run().take_step(go_on)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == 0


def test_every_target_layer_gets_a_lora_and_the_base_stays_bitwise(make_run):
    run = make_run()
    before = {name: value.clone() for name, value in run.policy.model.state_dict().items() if "lora_" not in name}
    train(run)
    after = run.policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len(lora_modules(run.policy.model)) == 3 * 8  # three transformer blocks, attn1 and attn2, four layers each
    assert any(value.abs().sum() > 0 for name, value in run.parameters.items() if name.endswith(".up"))


def test_with_the_adapter_off_the_unet_is_the_base_model(make_run):
    run = train(make_run())
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), torch.randn(2, 3, 8)
    base = tiny_unet()(x, t, c).sample
    with torch.no_grad():
        with adapter_off(run.policy.model):
            torch.testing.assert_close(run.policy.model(x, t, c).sample, base, rtol=0, atol=0)
        assert not torch.equal(run.policy.model(x, t, c).sample, base)


def test_the_adapter_comes_back_on_after_an_error(make_run):
    run = make_run()
    with pytest.raises(RuntimeError), adapter_off(run.policy.model):
        raise RuntimeError
    assert all(not module.disable_adapters for _, module in lora_modules(run.policy.model))
    assert all(value.requires_grad for value in lora_parameters(run.policy.model).values())


def test_one_batch_of_4_equals_4_batches_of_1_accumulated(pairs, make_run):
    """The same draws in both: batch 4's are cut into four single pairs."""
    whole, single = make_run(batch_size=4, anchor_weight=10.0), make_run(batch_size=1, anchor_weight=10.0)
    batch = whole.plan.batch(0)
    loss, _ = batch_loss(whole.policy, whole.plan.cache, batch, whole.recipe, whole.device)
    loss.backward()
    for i in range(4):
        part = type(batch)(**{name: value[i : i + 1] for name, value in vars(batch).items()})
        loss, _ = batch_loss(single.policy, single.plan.cache, part, single.recipe, single.device)
        (loss / 4).backward()
    for name, value in whole.parameters.items():
        # beta 5000 multiplies the rounding of errors of about 1: a gradient is right to some 2500 x 1e-7 of its size.
        assert_close_at_scale(single.parameters[name].grad, value.grad, relative=2e-3)


def test_same_seed_same_tensors_and_another_seed_others(make_run):
    first, second, other = train(make_run()), train(make_run()), train(make_run(seed=1))
    assert_same(weights_of(first), weights_of(second))
    assert not torch.equal(next(iter(weights_of(first).values())), next(iter(weights_of(other).values())))


def test_training_does_not_touch_the_global_random_state(make_run):
    run = make_run()
    before = torch.random.get_rng_state()
    train(run)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_run_resumed_at_any_step_ends_with_the_same_tensors(make_run, tmp_path, stop_at):
    options = {"schedule": "cosine", "anchor_weight": 5.0, "ema_decay": 0.5, "accumulation_steps": 2}
    straight = train(make_run(**options))
    first = train(make_run(**options), steps=stop_at)
    save_state(first, tmp_path / "a.resume", {"seed": 0})
    second = make_run(**options)
    restore_state(second, tmp_path / "a.resume", {"seed": 0})
    assert second.step == stop_at
    train(second)
    assert_same(weights_of(straight), weights_of(second))
    assert_same(straight.average, second.average)
    assert straight.records == second.records


def test_a_stop_in_the_middle_of_accumulation_changes_nothing(make_run):
    straight = train(make_run(accumulation_steps=3))
    run = make_run(accumulation_steps=3)
    answers = iter([False, False, True])
    assert run.take_step(lambda: next(answers)) is None
    assert run.step == 0
    assert_same(weights_of(straight), weights_of(train(run)))


def test_resuming_something_else_names_what_differs(make_run, tmp_path):
    run = train(make_run(), steps=1)
    save_state(run, tmp_path / "a.resume", {"seed": 0})
    with pytest.raises(InputError, match="its seed was 0, now it is 1"):
        restore_state(make_run(), tmp_path / "a.resume", {"seed": 1})
    with pytest.raises(InputError, match=r"cannot resume from .*missing.resume"):
        restore_state(make_run(), tmp_path / "missing.resume", {})
    (tmp_path / "a.resume").write_bytes((tmp_path / "a.resume").read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot resume from .*a.resume"):
        restore_state(make_run(), tmp_path / "a.resume", {"seed": 0})


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_run):
    class OverflowingCache(MemoryCache):
        def conditions(self, prompts):
            return {"hidden_states": super().conditions(prompts)["hidden_states"] * float("inf")}

    run = make_run(OverflowingCache())
    before = weights_of(run)
    with pytest.raises(SafetyExpertsError, match="the loss became nan at step 1 of 6; lower learning_rate"):
        run.take_step(go_on)
    assert_same(before, weights_of(run))


def test_dpo_learns_to_tell_chosen_from_rejected(make_run):
    class SeparableCache(MemoryCache):
        """Chosen images are bright, rejected ones dark: a preference that can be learnt at every noise level."""

        def latents(self, pair, *, flipped=False):
            return torch.full((4, 4, 4), 1.5), torch.full((4, 4, 4), -1.5)

    run = train(make_run(SeparableCache(), steps=60, learning_rate=1e-2, beta=500.0, last_timestep=600, rank=4))
    assert sum(record["rewards/accuracies"] for record in run.records[-20:]) / 20 >= 0.95
    assert sum(record["loss"] for record in run.records[-20:]) / 20 < math.log(2) / 2


def test_the_anchor_keeps_predictions_on_safe_prompts_closer_to_the_base(make_run):
    free = train(make_run(steps=30, learning_rate=3e-3))
    held = train(make_run(steps=30, learning_rate=3e-3, anchor_weight=5000.0))

    def drift(run):
        measured = [run.plan.batch(number) for number in range(100, 104)]
        recipe = run.recipe.model_copy(update={"anchor_weight": 1.0})
        return sum(
            batch_loss(run.policy, run.plan.cache, batch, recipe, run.device)[1]["loss/anchor"] for batch in measured
        )

    assert drift(held) < drift(free) / 2


def test_an_anchor_in_some_passes_weighs_what_one_in_every_pass_weighs(make_run):
    run = train(make_run(anchor_weight=5.0, anchor_every=3, accumulation_steps=3, learning_rate=1e-2))
    for record in run.records[1:]:
        assert record["loss"] == pytest.approx(record["loss/preference"] + 5 * record["loss/anchor"], rel=1e-5)
        assert record["loss/anchor"] > 0 and record["drift"] > 0
    sparse = train(make_run(anchor_weight=5.0, anchor_every=4))
    assert ["loss/anchor" in record for record in sparse.records] == [True, False, False, False, True, False]


def test_both_images_of_a_pair_share_noise_timestep_and_flip(make_run):
    run = make_run(horizontal_flip=True, batch_size=6)
    flips = set()
    for number in range(4):
        batch = run.plan.batch(number)
        assert torch.equal(batch.timesteps, batch.rejected_timesteps)
        for row in range(6):
            for pair in run.plan.pairs:
                for flipped in (False, True):
                    chosen, rejected = run.plan.cache.latents(pair, flipped=flipped)
                    if torch.equal(batch.chosen[row], chosen):
                        assert torch.equal(batch.rejected[row], rejected)
                        flips.add(flipped)
    assert flips == {False, True}


def test_every_epoch_sees_every_pair_and_batches_hold_one_size(make_run):
    pairs = [make_pair(number) for number in range(7)]
    cache = MemoryCache({"pair5": (4, 8), "pair6": (4, 8)})
    run = make_run(cache, pairs, batch_size=2, caption_dropout_fraction=0.0)
    for epoch in range(2):
        batches = [run.plan.batch(epoch * 4 + number) for number in range(4)]
        assert {prompt for batch in batches for prompt in batch.prompts} == {pair.prompt for pair in pairs}
        assert sorted(tuple(batch.chosen.shape[2:]) for batch in batches) == [(4, 4), (4, 4), (4, 4), (4, 8)]


def test_caption_dropout_empties_the_prompt_of_both_images_about_as_often_as_asked(make_run):
    run = make_run(batch_size=6, caption_dropout_fraction=0.3)
    prompts = [prompt for number in range(100) for prompt in run.plan.batch(number).prompts]
    assert 0.25 < prompts.count("") / len(prompts) < 0.35


def test_duo_draws_two_timesteps_and_anchors_on_pure_noise(make_run):
    run = make_run(shared_timestep=False, anchor_samples="noise", anchor_weight=1.0, last_timestep=749)
    batch = run.plan.batch(0)
    assert not torch.equal(batch.timesteps, batch.rejected_timesteps)
    assert run.take_step(go_on)["loss/anchor"] == 0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_schedules_are_the_textbook_curves(schedule, expected):
    recipe = Recipe(schedule=schedule, warmup_steps=2, steps=6, learning_rate=1.0)
    assert [learning_rate_at(recipe, step) for step in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_takes_a_step(name, pairs):
    recipe = load_recipe(name)
    unet = tiny_unet()
    attach_lora(unet, recipe)
    denoiser = UNetDenoiser(unet, torch.linspace(0.999, 0.005, 1000), "epsilon")
    policy, plan, device = LoraPolicy(denoiser, recipe.lora_alpha), BatchPlan(pairs, MemoryCache(), recipe), "cpu"
    held_out = HeldOut(pairs[:2], MemoryCache(), recipe, torch.device(device)) if recipe.held_out_fraction else None
    run = TrainingRun(policy, plan, recipe, torch.device(device), held_out=held_out)
    before = weights_of(run)
    assert math.isfinite(run.take_step(go_on)["loss"])
    assert any(not torch.equal(value, before[key]) for key, value in weights_of(run).items())


def test_targets_choose_the_attention_layers():
    for targets, count in (("attention", 24), ("self-attention", 12), ("cross-attention", 12)):
        unet = tiny_unet()
        attach_lora(unet, Recipe(targets=targets))
        assert len(lora_modules(unet)) == count
    layers = read_layers(unet, alpha=4.0)
    assert sorted(layers)[0] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert {layer.rank for layer in layers.values()} == {4}


def test_half_precision_scales_its_loss_and_repeats_a_step_that_overflows(make_run):
    exact, half = make_run(beta=100.0), make_run(beta=100.0)
    half.policy.denoiser.autocast_dtype = torch.float16
    for _ in range(3):
        exact.take_step(go_on)
        half.take_step(go_on)
    assert half.records[0]["loss_scale"] >= 1
    for before, after in zip(exact.records, half.records, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=0.02)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=0.05)

    huge = make_run(beta=1e5)  # gradients of 2^16 times this do not fit in 16 bits
    huge.policy.denoiser.autocast_dtype = torch.float16
    assert huge.take_step(go_on)["loss_scale"] < 2**16
    assert math.isfinite(huge.records[0]["grad_norm"])
    assert any(bool(value.any()) for name, value in huge.parameters.items() if name.endswith(".up"))
