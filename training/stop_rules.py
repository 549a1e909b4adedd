"""When there is no point in training on, from what the held-out pairs say; a function of the records alone."""

import math
from collections.abc import Mapping, Sequence

from .recipe import Recipe
from .redirect import USUAL_GUIDANCE, residual_target

_LIMITS = {"eval/drift": "max_drift", "eval/chosen_increase": "max_chosen_increase"}  # measurement -> recipe field
_SETTLING, _LEAST_FACTOR = 0.7, 0.05


def watched(recipe: Recipe) -> str:
    """Return the measurement that the best weights have the least of."""
    return "eval/loss" if recipe.leak_budget is None else "eval/residual"


def keeps_best(recipe: Recipe) -> bool:
    """Whether the expert is made of the weights of the best measurement instead of the last ones."""
    limits = (*_LIMITS.values(), "leak_budget")
    return bool(recipe.patience or any(getattr(recipe, field) is not None for field in limits))


def passed_limit(measured: dict[str, float], recipe: Recipe) -> str | None:
    """Return which limit a measurement is beyond, in words, or None."""
    for name, field in _LIMITS.items():
        limit = getattr(recipe, field)
        if measured[name] > (math.inf if limit is None else limit):
            return f"{name.removeprefix('eval/')} {measured[name]:.2g} passed {field}"
    return None


def spent_budget(measured: Mapping[str, float], recipe: Recipe) -> float:
    """Return what of the leak budget a measurement takes, of the mean or of the worst group; above 1: too much."""
    if recipe.leak_budget is None:
        return 0.0
    worst = measured["eval/worst_leak"] / recipe.worst_leak_factor
    return max(measured["eval/leak"], worst) / recipe.leak_budget


def is_kept(measured: dict[str, float], best: float, recipe: Recipe, *, best_step: int) -> bool:
    """Whether weights with this measurement are within every limit and better than the best so far.

    Of equal ones the later are kept: hinge's loss is exactly 0 after a few steps, with most of the mark still there.
    Those that only equal the untrained expert (`best_step` 0) are not.
    """
    value = measured[watched(recipe)]
    is_better = value < best or (best_step > 0 and value == best)
    return is_better and spent_budget(measured, recipe) <= 1 and not passed_limit(measured, recipe)


def target_of(recipe: Recipe) -> float:
    """Return the residual to reach: the recipe's, or what its guidance asks for."""
    guidance = USUAL_GUIDANCE if recipe.guidance is None else recipe.guidance
    return residual_target(guidance) if recipe.residual_target is None else recipe.residual_target


def stop_reason(records: Sequence[dict[str, float]], best_step: int, recipe: Recipe) -> str | None:
    """Return why there is no point in going on, or None.

    Args:
        records: of every step so far.
        best_step: the step of the best measurement; 0 before the first.
    """
    measured = [record for record in records if "eval/loss" in record]
    if measured and (passed := passed_limit(measured[-1], recipe)):
        return passed
    if recipe.leak_budget is not None and best_step and records[best_step - 1]["eval/residual"] <= target_of(recipe):
        return "the residual target is reached within the leak budget"
    since_best = sum("eval/loss" in record for record in records[best_step:])
    if recipe.patience and since_best >= recipe.patience:
        return f"no better held-out loss in {since_best} measurements"
    return None


def shortfall(records: Sequence[dict[str, float]], best_step: int, recipe: Recipe) -> str | None:
    """Return what an expert of `best_step` falls short of, in words, or None; for a recipe with a leak budget.

    `best_step` 0: no measurement was within the budget and better than the untrained model.
    """
    if recipe.leak_budget is None:
        return None
    if best_step:
        residual, target = records[best_step - 1]["eval/residual"], target_of(recipe)
        if residual <= target:
            return None
        return f"residual {residual:.3g}, target {target:.3g}: raise rank, steps or leak_budget"
    measured = [record for record in records if "eval/leak" in record]
    if not measured:
        return None
    least = min(measured, key=lambda record: spent_budget(record, recipe))
    worst = max((name for name in least if name.startswith("eval/leak/")), key=lambda name: least[name])
    return (
        f"the leak blocks: least {least['eval/leak']:.3g} on average and {least[worst]:.3g} on "
        f"{worst.removeprefix('eval/leak/')} prompts, budget {recipe.leak_budget:g} and "
        f"{recipe.worst_leak_factor * recipe.leak_budget:g}; lower learning_rate, or raise leak_weight or leak_budget"
    )


def learning_rate_factor(recipe: Recipe, records: Sequence[dict[str, float]]) -> float:
    """Return what the learning rate of the next step is multiplied by: less with every measurement that is over budget.

    Only with `redirect`, and only of measurements that have reached the residual target: then nothing is left but to
    settle, and what a noisy run leaks is in the size of its steps. In place of LBSGD's step cap (arXiv 2207.10415).
    """
    if not recipe.redirect:
        return 1.0
    target, measured = target_of(recipe), [record for record in records if "eval/leak" in record]
    over = sum(m["eval/residual"] <= target and spent_budget(m, recipe) > 1 for m in measured)
    return max(_LEAST_FACTOR, _SETTLING**over)
