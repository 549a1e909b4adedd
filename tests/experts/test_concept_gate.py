import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.experts.concept_gate import fit_concept_gate


def fit(unsafe, safe, empty=(0.0, 0.0), rate=0.0, others=()):
    """Fit a gate to prompts given as points of the plane."""
    names = {kind: [f"{kind} {n}" for n in range(len(points))] for kind, points in (("u", unsafe), ("s", safe))}
    other_names = [f"o {n}" for n in range(len(others))]
    points = dict(zip(names["u"] + names["s"] + other_names, [*unsafe, *safe, *others], strict=True))
    encoded = {name: torch.tensor(point) for name, point in {**points, "": empty}.items()}
    safe_prompts = {"hate": names["s"], "violence": other_names}
    return fit_concept_gate({"hate": names["u"]}, safe_prompts, encoded, rate)


UNSAFE = [(4.0, 1.0), (6.0, -1.0)]
SAFE = [(1.0, 1.0), (-1.0, -1.0)]


def test_worked_numbers():
    """Means are (5, 0) and (0, 0), so the direction is the x axis.

    Without itself each direction tilts: the safe points score (6·1 + 1·1)/√37 and (4·-1 + -1·-1)/√17, the unsafe ones
    (6·4 - 1·1)/√37 and (4·6 + 1·-1)/√17. The threshold is half-way between 7/√37 and 23/√37.
    """
    concept = fit(UNSAFE, SAFE).concepts["hate"]

    torch.testing.assert_close(concept.direction, torch.tensor([1.0, 0.0]))
    assert concept.threshold == pytest.approx(15 / 37**0.5)
    assert (concept.recall, concept.num_unsafe) == (1.0, 2)
    assert (concept.false_positive_rate, concept.num_safe) == (0.0, 2)


def test_a_conditioning_is_judged_by_its_mean_token_whatever_it_is_batched_with():
    gate = fit(UNSAFE, SAFE)
    unsafe = torch.tensor([[9.0, 5.0], [-1.0, 7.0]])  # mean 4 along x
    safe = torch.tensor([[9.0, 5.0], [-5.0, 7.0]])
    assert gate.opened(torch.stack([safe, unsafe, 0 * safe])).tolist() == [[False], [True], [False]]
    repeated = torch.stack([safe, unsafe]).repeat(1, 3, 1)  # how ComfyUI pads the shorter of two conditionings
    torch.testing.assert_close(gate.scores(repeated), gate.scores(torch.stack([safe, unsafe])))


def test_zeros_open_no_gate_even_where_their_score_would():
    gate = fit([(-4.0, 0.1), (-5.0, -0.1)], [(-9.0, 0.1), (-8.0, -0.1)], empty=(-9.0, 0.0))
    assert gate.concepts["hate"].threshold < 0
    assert gate.opened(torch.zeros(1, 3, 2)).tolist() == [[False]]
    assert gate.opened(torch.full((1, 3, 2), 1e-3)).tolist() == [[True]]


def test_the_allowed_false_positives_buy_recall():
    safe = [(float(x), 0.0) for x in (-2, -1, 0, 0, 0, 0, 0, 0, 1, 5)]
    unsafe = [(float(x), 0.0) for x in (3, 4, 6, 7)]
    strict, loose = (fit(unsafe, safe, rate=rate).concepts["hate"] for rate in (0.0, 0.1))
    assert (strict.false_positive_rate, strict.recall, strict.threshold) == (0.0, 0.5, 5.5)
    assert (loose.false_positive_rate, loose.recall, loose.threshold) == (0.1, 1.0, 2.0)


def test_the_empty_prompt_and_other_categories_safe_prompts_keep_it_closed():
    assert fit(UNSAFE, SAFE, empty=(4.5, 0.0), rate=1.0).concepts["hate"].threshold > 4.5
    concept = fit(UNSAFE, SAFE, others=[(4.5, 0.0)]).concepts["hate"]
    assert concept.threshold > 4.5 and concept.num_safe == 3


def test_random_directions_are_not_said_to_work():
    """In many dimensions a direction separates the very points it was made of: the rates must come from others."""
    generator = torch.Generator().manual_seed(0)
    unsafe, safe = torch.randn(2, 40, 400, generator=generator).tolist()
    concept = fit(unsafe, safe, empty=[0.0] * 400, rate=0.1).concepts["hate"]
    means = torch.tensor(unsafe), torch.tensor(safe)
    assert float((means[0] @ concept.direction).min()) > float((means[1] @ concept.direction).max())
    assert concept.recall < 0.4


@pytest.mark.parametrize(
    ("unsafe", "safe", "message"),
    [
        (UNSAFE[:1], SAFE, "hate has 1 unsafe and 2 safe prompts; give at least two"),
        (UNSAFE, UNSAFE, "gives the unsafe and safe prompts of hate one meaning"),
    ],
)
def test_prompts_that_teach_nothing_are_refused(unsafe, safe, message):
    with pytest.raises(InputError, match=message):
        fit(unsafe, safe)
