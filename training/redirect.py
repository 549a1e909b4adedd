"""Redirect: teach the unsafe prompt to act as its safe twin does, within a budget of change everywhere else.

Everything is a ratio to what the base model itself shows, so that no number has the units of one model's errors:

    Q    = mean ||base(z, unsafe) - base(z, safe)||^2             contrast: the change that is wanted
    R    = mean ||policy(z, unsafe) - base(z, safe)||^2 / Q       residual: 1 for a fresh adapter, 0 when it is reached
    leak = mean ||policy(z, retained) - base(z, retained)||^2 / Q

    loss = (R + w preference + lambda leak / budget) / (1 + w + lambda)

z are noisy images, chosen and rejected, under their own pair's two prompts. It is teacher-guided, not Diffusion-DPO,
and combines known parts: the safe prompt's prediction as teacher (concept ablation, arXiv 2303.13516; SalUn; DDSPO,
arXiv 2512.23426), a log-space multiplier and 1 + lambda (Safe RLHF), PI control of it (PID-Lagrangian, arXiv
2007.03964; nuPI), a barrier (LBSGD, arXiv 2207.10415), constrained diffusion alignment by duals (arXiv 2508.19104,
2605.30825).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from .objectives import mean_squared_error
from .recipe import Recipe

# Names in the records of a run.
RESIDUAL, LEAK, LEAK_WEIGHT = "redirect/residual", "redirect/leak", "redirect/leak_weight"

# The part of the base's contrast that may be left in a guided prediction. Of a half, a part of the pictures shows what
# is to go (benchmarks/robustness.py: up to a sixth in worlds that predict noise), since a half is where one sees it.
KEPT_CONTRAST = 1 / 3
USUAL_GUIDANCE = 7.5
# Q in units of the base's own error, below which its two prompts are one: low, since no real model has been measured.
LEAST_SEPARATION = 0.001
_SMOOTHING = 0.9
_PROPORTIONAL, _INTEGRAL = 0.5, 0.1
_LEAK_WEIGHTS = (1e-3, 1e3)
_LEAST_SLACK = 0.02


@dataclass(frozen=True)
class Balance:
    """What weighs the terms of one step.

    Args:
        contrast: Q.
        leak_weight: lambda.
        leak_budget: the leak that lambda counts against.
        preference_weight: w, 0 for none.
    """

    contrast: float
    leak_weight: float
    leak_budget: float
    preference_weight: float = 0.0

    def loss(self, residual: Tensor, leak: Tensor, preference: Tensor | float = 0.0) -> Tensor:
        """Return the loss [] of R, leak and weighed preference; its step size does not change with lambda."""
        total = residual + preference + self.leak_weight * leak / self.leak_budget
        return total / (1 + self.preference_weight + self.leak_weight)


def relative_change(prediction: Tensor, goal: Tensor, contrast: float) -> Tensor:
    """Return the mean squared difference of predictions [b, …] from a goal, in units of the contrast: []."""
    return mean_squared_error(prediction, goal).mean() / contrast


def residual_target(guidance: float, kept: float = KEPT_CONTRAST) -> float:
    """Return the R to reach for a model that is drawn with this classifier-free guidance.

    Guidance s shows s sqrt(R) of the base's unguided contrast; at most a third of it may be left: R = (1 / (3 s))^2.
    """
    return (kept / max(1.0, guidance)) ** 2


def leak_weight_at(recipe: Recipe, records: Sequence[dict[str, float]]) -> float:
    """Return lambda of the next step, from the records of the steps before.

    constant: the recipe's. dual: starts from it and follows how far the smoothed leak is above the budget, by a PI rule
    in log space. barrier: the recipe's, divided by the share of the budget that is left.
    """
    leaks = [record[LEAK] for record in records if LEAK in record]
    if recipe.leak_control == "constant" or not leaks:
        return recipe.leak_weight
    assert recipe.leak_budget
    shares = [leak / recipe.leak_budget for leak in smoothed(leaks)]
    if recipe.leak_control == "barrier":
        return barrier_weight(recipe.leak_weight, shares[-1])
    excess = [min(1.0, max(-1.0, share - 1)) for share in shares]
    return dual_weight(records[-1][LEAK_WEIGHT], excess[-1], excess[-2] if len(excess) > 1 else excess[-1])


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running mean after each value, older ones weighing less by 0.9 a step, without a bias to zero."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        means.append(total / weight)
    return means


def dual_weight(weight: float, excess: float, excess_before: float) -> float:
    """Return lambda exp(0.1 v + 0.5 (v - v_before)) within its limits; v = leak / budget - 1, from -1 to 1."""
    low, high = _LEAK_WEIGHTS
    return min(high, max(low, weight * math.exp(_INTEGRAL * excess + _PROPORTIONAL * (excess - excess_before))))


def barrier_weight(strength: float, share: float) -> float:
    """Return strength / slack, where `share` of the budget is used; the slack counts as 0.02 at least."""
    return strength / max(_LEAST_SLACK, 1 - share)


def retained_shares(recipe: Recipe, records: Sequence[dict[str, float]], names: Collection[str]) -> dict[str, float]:
    """Return how often the next step draws each group of retained prompts; the shares add up to 1.

    `retain_by_leak` of the rows go to the groups by what they leaked when last measured, the others to all alike: the
    worst group decides what is kept, so it gets the rows. After C-DPO's allotment (arXiv 2403.02475) and RePO's
    rectified costs (arXiv 2410.19933), without a second multiplier. Equal shares before the first measurement.
    """
    measured = next((record for record in reversed(records) if "eval/leak" in record), {})
    leaks = {name: measured.get(f"eval/leak/{name}", 0.0) for name in names}
    total = sum(leaks.values())
    by_leak = recipe.retain_by_leak if total else 0.0
    return {
        name: (1 - by_leak) / len(leaks) + by_leak * (leak / total if total else 0.0) for name, leak in leaks.items()
    }


def check_separation(untrained: Mapping[str, float]) -> None:
    """Refuse pairs whose two prompts are one to the base model: then there is nothing to redirect, and no unit.

    Args:
        untrained: what the held-out pairs measure without the LoRA.

    Raises:
        InputError: Q is below a thousandth of the base model's own error.
    """
    if untrained["eval/separation"] < LEAST_SEPARATION:
        raise InputError(
            f"the base model does not separate these prompts: unsafe and safe ones change its prediction by "
            f"{untrained['eval/separation']:.2g} of its error, at least {LEAST_SEPARATION:g} is needed; write safe "
            "prompts that differ in what makes the others unsafe, or use a model that knows it"
        )
