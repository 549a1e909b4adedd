"""The beta helper: a beta that keeps the gradients of the preference loss at a wished-for share of their full size."""

import math
import statistics
from collections.abc import Sequence

from .recipe import Recipe

_DECAY = 0.99
_RANGE = 1000.0  # the reach of the source's clamp, from the smallest to the largest beta


def beta_at(recipe: Recipe, records: Sequence[dict[str, float]]) -> float:
    """Return beta of the next step, from the records of the steps before; the recipe's own without a target.

        beta = -2 logit(f) / mean |m|,    m = (reference - policy)(chosen) - (reference - policy)(rejected)

    so that a pair of the usual error margin m has gradient factor sigmoid(-u) = f, u = (beta/2) m. The mean runs over
    the steps so far, older ones weighing less by 0.99 a step. A fresh expert has m = 0, so the recipe's beta is the
    upper limit, and a 1000th of it the lower one. Where the signed margins are not above two standard errors of their
    mean, |m| is noise: then the contrast Q (redirect.py) takes its place, if a leak budget has it measured.

    Source: bghira/SimpleTuner flow_dpo, auto_beta (methods §6).
    """
    if recipe.target_gradient_factor is None or not records:
        return recipe.beta
    mean, weight = 0.0, 0.0
    for record in records:
        mean = _DECAY * mean + (1 - _DECAY) * record["error_margin"]
        weight = _DECAY * weight + (1 - _DECAY)
    margin = mean / weight
    contrast = next((record["eval/contrast"] for record in records if "eval/contrast" in record), None)
    if contrast is not None and not _is_shown(recipe, records):
        margin = contrast
    factor = recipe.target_gradient_factor
    wished = 2 * math.log((1 - factor) / factor) / margin if margin else math.inf
    return min(recipe.beta, max(recipe.beta / _RANGE, wished))


def _is_shown(recipe: Recipe, records: Sequence[dict[str, float]]) -> bool:
    """Whether the pairs' signed margins are above two standard errors of their mean."""
    margins = [2 * record["rewards/margins"] / record.get("beta", recipe.beta) for record in records]
    if len(margins) < 2:
        return False
    return statistics.fmean(margins) > 2 * statistics.stdev(margins) / math.sqrt(len(margins))
