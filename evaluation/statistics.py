"""Numbers that carry their uncertainty: rates, paired contrasts, resampling by prompt, families of tests.

Sources: Wilson (1927) for a rate; Newcombe (1998, Statistics in Medicine 17:2635, method 10) for the difference of two
paired rates; McNemar's exact and mid-p test; Holm (1979) over a family. With several images a prompt the prompt is the
unit: Wilson with the effective number of images and Student's t (Franco et al. 2019, J. of Survey Statistics and
Methodology 7:334), joined for a difference as Newcombe does (Zou and Donner 2008, Statistics in Medicine 27:1693);
means by the expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69:371). How often each covers
the truth: benchmarks/coverage.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Z95 = 1.959963984540054
DRAWS = 4000

Verdict = Literal["kept", "not shown", "not testable"]


@dataclass(frozen=True)
class Rate:
    """A fraction of `num_images` with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    num_images: int

    def to_json(self) -> dict:
        return {key: round(value, 4) if key != "num_images" else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Contrast:
    """Two paired rates: outcomes of the same prompts and seeds with (before) and (after) something changed.

    Attributes:
        both, only_before, only_after, neither: the 2 x 2 table, in images.
        difference: rate after minus rate before, with its 95 % interval `low` to `high`.
        p: McNemar's exact two-sided P; `mid_p` its less conservative mid-p form. None where a prompt has several
            images, which the test does not allow.
        method: which interval it is, "newcombe" or "newcombe by prompt".
        num_prompts: independent units.
    """

    both: int
    only_before: int
    only_after: int
    neither: int
    difference: float
    low: float
    high: float
    p: float | None
    mid_p: float | None
    method: str
    num_prompts: int

    @property
    def num_images(self) -> int:
        return self.both + self.only_before + self.only_after + self.neither


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval over resampled prompts; `num_prompts` is the number of independent units."""

    value: float
    low: float
    high: float
    num_prompts: int


def rate_of(outcomes: Sequence[bool]) -> Rate:
    """Return the fraction of True with its 95 % Wilson score interval.

    Raises:
        ValueError: `outcomes` is empty.
    """
    return rate_of_counts(sum(outcomes), len(outcomes))


def rate_of_counts(hits: int, num_images: int) -> Rate:
    """Return `hits` of `num_images` as `rate_of` does.

    Raises:
        ValueError: there are no images.
    """
    if not num_images:
        raise ValueError("a rate needs at least one outcome")
    low, high = wilson_interval(hits / num_images, num_images)
    return Rate(hits / num_images, low, high, num_images)


def wilson_interval(fraction: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return the score interval of a fraction of n; n may be an effective number."""
    centre = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate_by_prompt(outcomes: Mapping[Any, Sequence[bool]]) -> Rate:
    """Return the rate over all images of several prompts; the prompt is the unit.

    One image a prompt: Wilson. Several: as `share_by_prompt`.

    Args:
        outcomes: prompt -> one outcome an image.

    Raises:
        ValueError: there are no images.
    """
    flat = [outcome for images in outcomes.values() for outcome in images]
    if len(flat) == len(outcomes) or not flat:
        return rate_of(flat)
    share = share_by_prompt({prompt: [float(x) for x in images] for prompt, images in outcomes.items()})
    return Rate(sum(flat) / len(flat), share.low, share.high, len(flat))


def share_by_prompt(values: Mapping[Any, Sequence[float]]) -> Mean:
    """Return the mean of shares in 0..1, prompt -> one a picture, with Wilson's interval for as many as they are worth.

    What prompts differ by says how many independent images there are; where they all agree, each counts as one.

    Raises:
        ValueError: there are no values.
    """
    sums, counts = _sums_and_counts(values)
    share, num_prompts = float(sums.sum() / counts.sum()), len(sums)
    low, high = _share_interval(share, _influence(sums, counts))
    return Mean(share, low, high, num_prompts)


def _sums_and_counts(values: Mapping[Any, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    filled = [list(images) for images in values.values() if len(images)]
    if not filled:
        raise ValueError("a mean needs at least one value")
    return np.array([math.fsum(images) for images in filled]), np.array([len(images) for images in filled], dtype=float)


def _influence(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return how far each prompt moves the mean over all images, in units of a prompt with as many images as most."""
    return (sums - counts * sums.sum() / counts.sum()) / counts.mean()


def _share_interval(share: float, influence: np.ndarray) -> tuple[float, float]:
    num_prompts, squares = len(influence), float(influence @ influence)
    if num_prompts < 2 or squares < 1e-12:
        return wilson_interval(share, num_prompts)
    variance = squares / (num_prompts * (num_prompts - 1))
    return wilson_interval(share, share * (1 - share) / variance, student_t95(num_prompts - 1))


def student_t95(freedom: int) -> float:
    """Return the .975 quantile of Student's t: exact for 1 and 2 degrees of freedom, within .2 % from 3 on.

    Abramowitz and Stegun 26.7.5.
    """
    if freedom <= 2:
        return (12.706204736, 4.302652730)[freedom - 1]
    z, odd = Z95, (1, 3, 5, 7, 9)
    z1, z3, z5, z7, z9 = (z**power for power in odd)
    terms = (
        (z3 + z1) / 4,
        (5 * z5 + 16 * z3 + 3 * z1) / 96,
        (3 * z7 + 19 * z5 + 17 * z3 - 15 * z1) / 384,
        (79 * z9 + 776 * z7 + 1482 * z5 - 1920 * z3 - 945 * z1) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def contrast_by_prompt(pairs: Mapping[Any, Sequence[tuple[bool, bool]]]) -> Contrast:
    """Compare paired outcomes: prompt -> (before, after) of each of its images.

    One image a prompt: Newcombe's interval and McNemar's test. Several: the intervals of both rates by prompt, joined
    as Newcombe joins Wilson's, by how they go together over prompts, and no test.

    Raises:
        ValueError: there are no pairs.
    """
    flat = [pair for images in pairs.values() for pair in images]
    if not flat:
        raise ValueError("a contrast needs at least one pair")
    cells = ((True, True), (True, False), (False, True), (False, False))
    both, only_before, only_after, neither = (flat.count(cell) for cell in cells)
    if len(flat) == len(pairs):
        return paired_contrast(both, only_before, only_after, neither)
    (before, its), (after, others) = (_side_by_prompt(pairs, side) for side in (0, 1))
    low, high = _joined_interval(before, after, _correlation_by_prompt(its, others, len(flat)))
    difference = after[0] - before[0]
    return Contrast(
        both, only_before, only_after, neither, difference, low, high, None, None, "newcombe by prompt", len(its)
    )


def _side_by_prompt(
    pairs: Mapping[Any, Sequence[tuple[bool, bool]]], side: int
) -> tuple[tuple[float, float, float], np.ndarray]:
    """Return ((rate, low, high), influence of each prompt) of the outcomes before (0) or after (1)."""
    sums, counts = _sums_and_counts(
        {prompt: [float(pair[side]) for pair in images] for prompt, images in pairs.items()}
    )
    influence, share = _influence(sums, counts), float(sums.sum() / counts.sum())
    return (share, *_share_interval(share, influence)), influence


def _correlation_by_prompt(before: np.ndarray, after: np.ndarray, num_images: int) -> float:
    """Return the correlation of two rates; with one image a prompt it is the corrected phi of the table."""
    spread = math.sqrt(float(before @ before) * float(after @ after))
    if spread < 1e-12:
        return 0.0
    together = float(before @ after)
    if together > 0:
        together = max(0.0, together - len(before) / (2 * num_images))
    return together / spread


def paired_contrast(both: int, only_before: int, only_after: int, neither: int) -> Contrast:
    """Return the contrast of a 2 x 2 table of independent pairs (Newcombe's method 10, McNemar).

    Raises:
        ValueError: the table is empty.
    """
    n = both + only_before + only_after + neither
    if not n:
        raise ValueError("a contrast needs at least one pair")
    before, after = (both + only_before) / n, (both + only_after) / n
    sides = [(rate, *wilson_interval(rate, n)) for rate in (before, after)]
    low, high = _joined_interval(sides[0], sides[1], _correlation(both, only_before, only_after, neither))
    p, mid_p = mcnemar(only_before, only_after)
    return Contrast(both, only_before, only_after, neither, after - before, low, high, p, mid_p, "newcombe", n)


def _joined_interval(
    before: tuple[float, float, float], after: tuple[float, float, float], correlation: float
) -> tuple[float, float]:
    """Return the interval of after - before from (rate, low, high) of both."""

    def joined(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first * first - 2 * correlation * first * second + second * second))

    difference = after[0] - before[0]
    low = difference - joined(after[0] - after[1], before[2] - before[0])
    high = difference + joined(after[2] - after[0], before[0] - before[1])
    return low, high


def _correlation(both: int, only_before: int, only_after: int, neither: int) -> float:
    """Return phi of the table, corrected for continuity where it is positive."""
    margins = (both + only_before) * (only_after + neither) * (both + only_after) * (only_before + neither)
    if not margins:
        return 0.0
    excess: float = both * neither - only_before * only_after
    if excess > 0:
        excess = max(0.0, excess - (both + only_before + only_after + neither) / 2)
    return excess / math.sqrt(margins)


def mcnemar(only_before: int, only_after: int) -> tuple[float, float]:
    """Return the two-sided exact P of as uneven a split of the changed pairs, and its mid-p."""
    changed, fewer = only_before + only_after, min(only_before, only_after)
    if not changed:
        return 1.0, 1.0
    log_half = changed * math.log(2)

    def probability(k: int) -> float:
        return math.exp(math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) - log_half)

    exact = 2 * sum(probability(k) for k in range(fewer + 1))
    return min(1.0, exact), max(0.0, exact - probability(fewer))  # the split itself counts half


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Return Holm's adjusted P of each test of a family declared beforehand."""
    adjusted: dict[Any, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def prompt_draws(num_prompts: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return how often each prompt is in each resample, [draws, num_prompts] int64; the same for the same numbers."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=draws)


def mean_by_prompt(values: Mapping[Any, Sequence[float]], draws: int = DRAWS, seed: int = 0) -> Mean:
    """Return the mean over all images, with a bootstrap interval that resamples prompts with all their images.

    Args:
        values: prompt -> a number an image (a paired difference, a score).

    Raises:
        ValueError: there are no values.
    """
    sums, counts = _sums_and_counts(values)
    value, num_prompts = float(sums.sum() / counts.sum()), len(sums)
    if num_prompts == 1:
        return Mean(value, -math.inf, math.inf, 1)
    times = prompt_draws(num_prompts, draws, seed)
    means = (times @ sums) / (times @ counts)
    low, high = np.quantile(means, expanded_tails(num_prompts))
    return Mean(value, float(low), float(high), num_prompts)


def expanded_tails(n: int) -> tuple[float, float]:
    """Return the percentiles of a bootstrap of n units that stand for .025 and .975 (Hesterberg 2015).

    Resampled means spread by sqrt((n - 1) / n) too little, and as the normal's rather than Student's t.
    """
    tail = math.erfc(math.sqrt(n / (n - 1)) * student_t95(n - 1) / math.sqrt(2)) / 2
    return tail, 1 - tail


def effective_number(num_images: int, images_per_prompt: float, intraclass: float) -> float:
    """Return how many independent images `num_images` are worth, k of a prompt correlating by `intraclass`."""
    return num_images / (1 + (images_per_prompt - 1) * intraclass)


@dataclass(frozen=True)
class NonInferiority:
    """Whether a metric is kept within a margin that was set before the run.

    Attributes:
        low, high: 95 % interval of after - before, turned so that positive is better.
        verdict: "kept" (the lower end is above -margin), "not shown", or "not testable": even no loss at all could
            not have shown it with so few prompts.
    """

    margin: float
    low: float
    high: float
    verdict: Verdict


def smallest_margin(num_prompts: int) -> float:
    """Return the margin of a rate that even zero losses among so many prompts cannot beat."""
    return wilson_interval(0.0, num_prompts)[1]


def non_inferior(low: float, high: float, margin: float, num_prompts: int, *, is_rate: bool) -> NonInferiority:
    """Judge an interval of (after - before), positive meaning better, against `margin` > 0.

    Args:
        is_rate: a difference of rates, for which the smallest margin that can be tested is known.
    """
    if is_rate and margin <= smallest_margin(num_prompts):
        return NonInferiority(margin, low, high, "not testable")
    return NonInferiority(margin, low, high, "kept" if low > -margin else "not shown")


def corrected_prevalence(flagged: float, sensitivity: float, specificity: float) -> float:
    """Return the share of unsafe images behind a share `flagged` of a detector (Rogan and Gladen 1978), in 0..1.

    Raises:
        ValueError: the detector is no better than chance.
    """
    skill = sensitivity + specificity - 1
    if skill <= 0:
        raise ValueError("a detector whose sensitivity and specificity sum to 1 or less says nothing")
    return min(1.0, max(0.0, (flagged + specificity - 1) / skill))
