"""Worked numbers. At beta 2 the logit is the fall of the chosen error minus the fall of the rejected one."""

import dataclasses
import math

import pytest
import torch
from safety_experts.training.objectives import (
    OBJECTIVES,
    PairErrors,
    PairPredictions,
    anchor_loss,
    mean_squared_error,
    preference_metrics,
    preserve_winner,
)
from safety_experts.training.recipe import Recipe, load_recipe


def loss(name, predictions, beta=2.0, **parameters):
    """The loss of each pair [b]."""
    objective = OBJECTIVES[name]
    return objective.loss(predictions, beta, objective.parameters(**parameters))


def predictions_of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, unsafe=(False, True)):
    """One pair of 1x1x1 predictions against target 0, so that an error is the square of the number given."""
    values = [
        torch.full((1, 1, 1, 1), math.sqrt(v), dtype=torch.float64)
        for v in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    ]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return PairPredictions(*values, zero, zero, *(torch.tensor([flag]) for flag in unsafe))


def loss_of(name, *errors, unsafe=(False, True), **options):
    return loss(name, predictions_of(*errors, unsafe=unsafe), **options).item()


def test_policy_equal_to_reference_gives_ln_2():
    assert loss_of("sigmoid", 0.3, 0.7, 0.3, 0.7, beta=5000.0) == pytest.approx(math.log(2), abs=1e-7)


def test_worked_numbers_where_the_chosen_error_falls_by_2_and_the_rejected_rises_by_1():
    """u = 3, rewards +2 and -1."""
    case = (1.0, 4.0, 3.0, 3.0)
    assert loss_of("sigmoid", *case) == pytest.approx(math.log(1 + math.exp(-3)))
    assert loss_of("hinge", *case) == 0
    assert loss_of("ipo", *case) == pytest.approx(2.5**2)
    # (-0.8 log s(3) + 0.2 log s(-3)) / 0.6
    yes, no = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    assert loss_of("robust", *case, label_smoothing=0.2) == pytest.approx((0.8 * yes - 0.2 * no) / 0.6)
    # margin 1 inside the sigmoid for a safe-over-unsafe pair: u becomes 2
    assert loss_of("safe-dpo", *case, safety_margin=1.0) == pytest.approx(math.log(1 + math.exp(-2)))
    # focal weight (2 - 2 s(3))^2
    weight = (2 / (1 + math.exp(3))) ** 2
    assert loss_of("sc-dpo", *case, focus=2.0) == pytest.approx(weight * yes)
    # baseline max(0, (2 - 1) / 2) = 0.5: (2 - s(1.5) - s(1.5)) / 2
    assert loss_of("kto", *case) == pytest.approx(1 - 1 / (1 + math.exp(-1.5)))
    # KL(Bern(s(3)) || Bern(0.9))
    p, q = 1 / (1 + math.exp(-3)), 0.9
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loss_of("dmpo", *case, target_probability=0.9) == pytest.approx(kl)
    # f(m) = 0.5 m / (e^{0.5 m} - 1): f(1) = 0.770747, f(4) = 0.313035, 1000 times the difference saturates
    assert loss_of("mapo", *case, mapo_beta=0.1) == pytest.approx(1.0)
    # (p - b (1 - s(u)) (p - ref))^2 with p = 1, ref = sqrt 3, b = 2
    pull = 2 * (1 - p)
    assert loss_of("dspo", *case) == pytest.approx((1 - pull * (1 - math.sqrt(3))) ** 2)


@pytest.mark.parametrize(
    ("chosen_change", "rejected_change", "share", "expected"),
    [
        (-2, 1, 0.5, 0.08852),  # u_b = 2.3799
        (-2, 1, 0.9, 0.05670),  # u_b = 2.8414
        (0, 100, 0.5, 0.40547),  # u_b = ln 2, all that the rejected image can add
        (0, 100, 0.9, 0.09531),  # u_b = ln 10
        (-2, 1, 0.0, 0.12693),  # u_b = 2: the rejected image is dropped
        (0, 0, 0.7, 0.69315),
    ],
)
def test_the_bounded_loss_gains_no_more_from_a_rejected_image_than_its_share(
    chosen_change, rejected_change, share, expected
):
    errors = (5.0 + chosen_change, 5.0 + rejected_change, 5.0, 5.0)
    assert loss_of("bounded", *errors, rejected_share=share) == pytest.approx(expected, abs=5e-6)


def test_safe_dpo_takes_the_mean_over_the_pairs_that_it_keeps():
    case = (1.0, 4.0, 3.0, 3.0)
    kept, dropped = predictions_of(*case), predictions_of(*case, unsafe=(True, True))
    both = PairPredictions(
        *(torch.cat([getattr(kept, f.name), getattr(dropped, f.name)]) for f in dataclasses.fields(PairPredictions))
    )
    assert loss("safe-dpo", both).mean().item() == pytest.approx(loss_of("safe-dpo", *case))


def test_a_margin_counts_against_the_logit():
    """Worked numbers of the reference (constrained §1): u 3."""
    case = (1.0, 4.0, 3.0, 3.0)
    assert loss_of("safe-dpo", *case, safety_margin=1.0) == pytest.approx(0.12693, abs=5e-6)
    assert loss_of("safe-dpo", *case, safety_margin=10.0) == pytest.approx(7.00091, abs=5e-6)


def test_mapo_pulls_towards_the_smaller_error_when_the_order_is_wrong():
    f = lambda m: 0.5 * m / math.expm1(0.5 * m)  # noqa: E731
    ratio = 1000 * (f(0.21) - f(0.2))
    assert loss_of("mapo", 0.21, 0.2, 0, 0) == pytest.approx(0.21 + 0.1 * math.log(1 + math.exp(-ratio)))


def test_dmpo_is_zero_at_its_target_and_nowhere_below():
    logit = math.log(0.99 / 0.01)
    assert loss_of("dmpo", 1.0, 1.0 + logit, 1.0, 1.0) == pytest.approx(0, abs=1e-12)
    assert loss_of("dmpo", 1.0, 1.0, 1.0, 1.0) > 0


def test_safe_dpo_swaps_a_pair_whose_chosen_image_alone_is_unsafe_and_drops_one_where_both_are():
    case, swapped = (1.0, 4.0, 3.0, 3.0), (4.0, 1.0, 3.0, 3.0)
    assert loss_of("safe-dpo", *case, unsafe=(True, False)) == loss_of("safe-dpo", *swapped, unsafe=(False, True))
    assert loss_of("safe-dpo", *case, unsafe=(True, True)) == 0
    assert loss_of("safe-dpo", *case, unsafe=(False, False)) == loss_of("sigmoid", *case)
    assert loss_of("safe-dpo", *case, safety_margin=0.0) == loss_of("sigmoid", *case)


def test_sc_dpo_reorders_only_when_the_cost_outweighs_the_preference():
    case, swapped = (1.0, 4.0, 3.0, 3.0), (4.0, 1.0, 3.0, 3.0)
    plain = {"focus": 0.0, "unsafe": (True, False)}
    assert loss_of("sc-dpo", *case, cost_weight=2.0, **plain) == loss_of("sigmoid", *swapped)
    assert loss_of("sc-dpo", *case, cost_weight=0.5, **plain) == loss_of("sigmoid", *case)


def test_swapping_chosen_and_rejected_flips_the_sign_of_the_logit():
    errors = PairErrors(*torch.rand(4, 5, generator=torch.Generator().manual_seed(0)))
    swapped = errors.where_swapped(torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(errors.logit(7.0), -swapped.logit(7.0))


def random_predictions(dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    tensors = torch.randn(6, 3, 2, 2, 2, generator=generator, dtype=dtype)
    flags = torch.tensor([[False, True, True], [True, False, True]])
    tensors = [tensor.clone().requires_grad_(requires_grad and i < 2) for i, tensor in enumerate(tensors)]
    return PairPredictions(*tensors, *flags)


def test_the_sigmoid_objective_agrees_with_plain_python_on_random_tensors():
    p = random_predictions(torch.float32)
    losses = loss("sigmoid", p, beta=3.0)
    tensors = (p.policy_chosen, p.policy_rejected, p.reference_chosen, p.reference_rejected)
    targets = (p.target_chosen, p.target_rejected, p.target_chosen, p.target_rejected)
    for i in range(3):
        m = [
            sum((a - b) ** 2 for a, b in zip(x[i].flatten().tolist(), y[i].flatten().tolist(), strict=True)) / 8
            for x, y in zip(tensors, targets, strict=True)
        ]
        logit = -1.5 * ((m[0] - m[1]) - (m[2] - m[3]))
        assert losses[i].item() == pytest.approx(math.log(1 + math.exp(-logit)), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"kto", "sc-dpo"}))
def test_gradients_are_right_in_float64(name):
    base = random_predictions()

    def loss_at(chosen, rejected):
        return loss(name, PairPredictions(chosen, rejected, *list(vars(base).values())[2:]), beta=0.7)

    inputs = [tensor.clone().requires_grad_() for tensor in (base.policy_chosen, base.policy_rejected)]
    assert torch.autograd.gradcheck(loss_at, inputs)


@pytest.mark.parametrize(("name", "frozen"), [("kto", "baseline"), ("sc-dpo", "weight")])
def test_gradients_of_objectives_with_a_detached_part_follow_the_formula(name, frozen):
    """gradcheck would differentiate the detached part, so the formula is written out with that part held constant."""
    p = random_predictions(requires_grad=True)
    loss(name, p).sum().backward()
    got = p.policy_chosen.grad.clone()
    chosen = random_predictions(requires_grad=True)
    errors = chosen.errors()
    r_chosen, r_rejected = errors.rewards(2.0)
    if frozen == "baseline":
        z = torch.cat([r_chosen, r_rejected]).mean().clamp(min=0).item()
        expected = (2 - torch.sigmoid(r_chosen - z) - torch.sigmoid(z - r_rejected)) / 2
    else:
        u = errors.where_swapped(torch.tensor([False, True, False])).logit(2.0)
        weight = torch.tensor((2 - 2 * torch.sigmoid(u)).tolist(), dtype=torch.float64)
        expected = -weight * torch.nn.functional.logsigmoid(u)
    expected.sum().backward()
    torch.testing.assert_close(got, chosen.policy_chosen.grad)


def test_preserving_the_winner_keeps_values_and_scales_the_rejected_gradient_only():
    """g_chosen = (1, 0), g_rejected = (2, 1): product 2, |g_chosen|^2 = 1, so mu 0.5 scales by 0.25."""
    chosen = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).requires_grad_()
    rejected = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2).requires_grad_()
    zero, flag = torch.zeros(1, 1, 1, 2), torch.tensor([False])
    kept = preserve_winner(PairPredictions(chosen, rejected, zero, zero, zero, zero, flag, flag), strength=0.5)
    assert torch.equal(kept.policy_rejected, rejected)
    (kept.policy_chosen.sum() + kept.policy_rejected.sum()).backward()
    assert torch.equal(chosen.grad, torch.ones_like(chosen))
    torch.testing.assert_close(rejected.grad, torch.full_like(rejected, 0.25))


def test_preserving_the_winner_leaves_opposed_gradients_alone():
    chosen = torch.tensor([1.0]).view(1, 1, 1, 1)
    rejected = (-chosen).requires_grad_()
    zero, flag = torch.zeros(1, 1, 1, 1), torch.tensor([False])
    preserve_winner(
        PairPredictions(chosen, rejected, zero, zero, zero, zero, flag, flag), strength=0.9
    ).policy_rejected.backward()
    assert rejected.grad.item() == 1


def test_the_anchor_is_zero_where_nothing_changed_and_grows_with_the_square():
    reference = torch.zeros(2, 4, 3, 3)
    assert anchor_loss(reference, reference).item() == 0
    assert anchor_loss(reference + 2, reference).item() == pytest.approx(4)
    assert mean_squared_error(reference + 3, reference).tolist() == [9, 9]


def test_metrics_carry_trl_names_and_accuracy_counts_positive_logits():
    errors = PairErrors(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0]), torch.ones(2) * 2)
    assert preference_metrics(errors, beta=2.0) == {
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.0,
        "rewards/margins": 0.0,
        "rewards/accuracies": 0.5,
        "gradient_factor": 0.5,  # of u = 1 and -1
        "error_margin": 1.0,
        "error/chosen": 2.0,
        "error/reference_chosen": 2.0,
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_says_what_an_untrained_model_loses(name):
    parameters = OBJECTIVES[name].parameters()
    expected = OBJECTIVES[name].untrained_loss(parameters)
    found = loss(name, predictions_of(0.3, 0.7, 0.3, 0.7)).item()
    if expected is None:  # then it depends on the data
        assert found != loss(name, predictions_of(0.2, 0.7, 0.2, 0.7)).item()
    else:
        assert found == pytest.approx(expected)
        assert found == loss(name, predictions_of(0.2, 0.5, 0.2, 0.5)).item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recipes_offer_every_objective_and_every_number_it_takes(name):
    (chosen,) = load_recipe("toy", [f"objective={name}"]).objective.values()
    assert chosen == OBJECTIVES[name].parameters() and chosen.weight == 1
    assert name in Recipe.model_fields["objective"].description
    assert OBJECTIVES[name].title and OBJECTIVES[name].source and OBJECTIVES[name].formula


def test_the_margin_of_safe_dpo_may_be_a_share_of_the_gap():
    """Toy errors: chosen 0.0589, rejected 0.0238; at beta 1000 the whole gap is worth u = 17.55."""
    case = (0.0589, 0.0238, 0.0589, 0.0238)
    assert loss_of("safe-dpo", *case, beta=1000.0, margin_share=0.5) == pytest.approx(
        loss_of("safe-dpo", *case, beta=1000.0, safety_margin=0.5 * 17.55), rel=1e-4
    )
    reverse = (0.0238, 0.0589, 0.0238, 0.0589)  # no gap to close: no margin
    assert loss_of("safe-dpo", *reverse, beta=1000.0, margin_share=0.5) == pytest.approx(math.log(2))
    assert OBJECTIVES["safe-dpo"].untrained_loss(OBJECTIVES["safe-dpo"].parameters(margin_share=0.5)) is None
