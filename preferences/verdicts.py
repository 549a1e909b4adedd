"""What judges found, as it stands in a pair's scores and flags, and which pairs that leaves to train on.

Scores are called `judge/side/what` (raw numbers of one image) and `judge/side` (its verdict: 1 unsafe, 0 safe).
Verdicts are written together with the flags, so a pair without one was never judged, whatever its flags say.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

from .records import PreferencePair

SIDES = ("chosen", "rejected")

TrainingRule = Literal["all", "agreed", "agreed-or-accepted"]
TRAINING_RULES = get_args(TrainingRule)

# What the judges say of a pair against its labels; all but the first are left for review.
PairState = Literal["agreed", "swapped", "both-unsafe", "both-safe", "unjudged"]
PAIR_STATES = get_args(PairState)


def verdict_key(judge: str, side: str) -> str:
    """Return how the verdict of one judge on one image is called."""
    return f"{judge}/{side}"


def score_key(judge: str, side: str, what: str) -> str:
    """Return how a raw number of one judge on one image is called."""
    return f"{judge}/{side}/{what}"


def raw_scores(pair: PreferencePair, judge: str, side: str) -> dict[str, float]:
    """Return the raw numbers that one judge gave one image; {} where it gave none."""
    start = score_key(judge, side, "")
    return {key[len(start) :]: value for key, value in pair.scores.items() if key.startswith(start)}


def state_of(pair: PreferencePair) -> PairState:
    """Return what the judges say of a pair as it is trained on: a flipped one is the other way round."""
    if pair.chosen_unsafe is None or pair.rejected_unsafe is None or not is_judged(pair):
        return "unjudged"
    chosen, rejected = pair.chosen_unsafe, pair.rejected_unsafe
    if pair.review == "flipped":
        chosen, rejected = rejected, chosen
    if chosen:
        return "both-unsafe" if rejected else "swapped"
    return "agreed" if rejected else "both-safe"


def is_judged(pair: PreferencePair) -> bool:
    """Say whether a judge gave a verdict on each of the two images."""
    sides = {side for _, slash, side in (key.partition("/") for key in pair.scores) if slash and "/" not in side}
    return sides >= set(SIDES)


def is_trained_on(pair: PreferencePair, rule: TrainingRule) -> bool:
    """Say whether a rule lets a pair be trained on. What a reviewer dropped never is.

    all: every pair. agreed: what the judges agree with; pairs that nobody judged are not among them.
    agreed-or-accepted: also what a reviewer accepted or flipped.
    """
    if pair.review == "dropped":
        return False
    if rule == "all" or state_of(pair) == "agreed":
        return True
    return rule == "agreed-or-accepted" and pair.review in ("accepted", "flipped")


def count_states(pairs: Iterable[PreferencePair]) -> dict[str, dict[PairState, int]]:
    """Return category -> state -> how many pairs, dropped ones left out; a pair counts in each of its categories."""
    counts: dict[str, Counter[PairState]] = {}
    for pair in pairs:
        for category in pair.categories if pair.review != "dropped" else ():
            counts.setdefault(category, Counter())[state_of(pair)] += 1
    return {name: {state: counts[name][state] for state in PAIR_STATES} for name in sorted(counts)}
