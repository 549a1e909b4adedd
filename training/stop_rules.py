"""When there is no point in training on, from what the held-out pairs say; a function of the records alone."""

import math
from collections.abc import Sequence

from .recipe import Recipe

_LIMITS = {"eval/drift": "max_drift", "eval/chosen_increase": "max_chosen_increase"}  # measurement -> recipe field


def keeps_best(recipe: Recipe) -> bool:
    """Whether the expert is made of the weights of the best measurement instead of the last ones."""
    return bool(recipe.patience or any(getattr(recipe, field) is not None for field in _LIMITS.values()))


def passed_limit(measured: dict[str, float], recipe: Recipe) -> str | None:
    """Return which limit a measurement is beyond, in words, or None."""
    for name, field in _LIMITS.items():
        limit = getattr(recipe, field)
        if measured[name] > (math.inf if limit is None else limit):
            return f"{name.removeprefix('eval/')} {measured[name]:.2g} passed {field}"
    return None


def stop_reason(records: Sequence[dict[str, float]], best_step: int, recipe: Recipe) -> str | None:
    """Return why there is no point in going on, or None.

    Args:
        records: of every step so far.
        best_step: the step of the best measurement; 0 before the first.
    """
    measured = [record for record in records if "eval/loss" in record]
    if measured and (passed := passed_limit(measured[-1], recipe)):
        return passed
    since_best = sum("eval/loss" in record for record in records[best_step:])
    if recipe.patience and since_best >= recipe.patience:
        return f"no better held-out loss in {since_best} measurements"
    return None
