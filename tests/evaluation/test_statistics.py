"""Rates, contrasts and families against textbook values, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
from safety_experts.evaluation.statistics import (
    contrast_by_prompt,
    corrected_prevalence,
    effective_number,
    expanded_tails,
    holm,
    mcnemar,
    mean_by_prompt,
    non_inferior,
    paired_contrast,
    rate_by_prompt,
    rate_of,
    rate_of_counts,
    share_by_prompt,
    smallest_margin,
    student_t95,
    wilson_interval,
)

stats = pytest.importorskip("scipy.stats")


def test_wilson_interval_of_8_in_10_is_the_textbook_value():
    # p = 0.8, n = 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71675, half 0.22657
    rate = rate_of([True] * 8 + [False] * 2)
    assert rate.value == pytest.approx(0.8)
    assert (rate.low, rate.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 48), (24, 48), (3, 200), (200, 200)])
def test_the_interval_of_a_rate_is_scipys_wilson(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    rate = rate_of_counts(hits, n)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_rate_needs_an_outcome():
    with pytest.raises(ValueError, match="at least one"):
        rate_of([])
    with pytest.raises(ValueError, match="at least one"):
        rate_by_prompt({})


# Newcombe (1998) method 10, and a worked table of four cells with hardly any change.
@pytest.mark.parametrize(
    ("table", "difference", "low", "high", "p"),
    [((54, 40, 3, 103), 0.185, 0.1245, 0.2432, 3.0e-9), ((92, 3, 1, 0), 0.0208, -0.0301, 0.0783, 0.625)],
)
def test_a_paired_contrast_has_the_worked_values(table, difference, low, high, p):
    contrast = paired_contrast(*table)  # before - after there, after - before here
    assert (-contrast.difference, -contrast.high, -contrast.low) == pytest.approx((difference, low, high), abs=6e-5)
    assert contrast.p == pytest.approx(p, rel=0.02)


def test_a_contrast_turns_its_signs_when_the_arms_are_exchanged():
    there, back = paired_contrast(10, 7, 2, 30), paired_contrast(10, 2, 7, 30)
    assert back.difference == pytest.approx(-there.difference)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p == there.p


@pytest.mark.parametrize(("f", "g"), [(0, 0), (1, 0), (5, 5), (40, 3), (3, 40), (12, 17)])
def test_mcnemars_exact_p_is_the_binomial_test(f, g):
    p, mid_p = mcnemar(f, g)
    assert p == pytest.approx(stats.binomtest(f, f + g).pvalue if f + g else 1.0, abs=1e-12)
    if f != g:
        assert mid_p == pytest.approx(p - stats.binom.pmf(min(f, g), f + g, 0.5), abs=1e-12)
    else:
        assert mid_p == pytest.approx(1.0)


def test_holm_is_statsmodels_worked_example_and_monotone():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = dict(enumerate(generator.uniform(size=7)))
        adjusted = holm(p)
        in_order = [adjusted[name] for name in sorted(p, key=p.get)]
        assert in_order == sorted(in_order)
        assert all(p[name] <= adjusted[name] <= 1 for name in p)


def test_one_image_a_prompt_gives_the_plain_rate_and_contrast():
    outcomes = {number: [number % 3 == 0] for number in range(40)}
    assert rate_by_prompt(outcomes) == rate_of([images[0] for images in outcomes.values()])
    pairs = {number: [(number % 2 == 0, number % 5 == 0)] for number in range(40)}
    assert contrast_by_prompt(pairs).method == "newcombe"


def test_images_of_one_prompt_that_agree_count_as_one():
    single = rate_by_prompt({number: [number % 2 == 0] for number in range(60)})
    repeated = rate_by_prompt({number: [number % 2 == 0] * 8 for number in range(60)})
    assert repeated.num_images == 480
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.1)


def test_no_hit_among_clusters_is_not_certainty():
    assert rate_by_prompt({number: [False] * 4 for number in range(48)}).high == rate_of_counts(0, 48).high
    contrast = contrast_by_prompt({number: [(False, False)] * 4 for number in range(48)})
    assert contrast.low < -0.05 and contrast.high > 0.05


def test_prompts_that_all_agree_are_not_certainty_either():
    share = share_by_prompt({0: [0.25], 1: [0.25]})  # of attacks: both prompts open one picture of four
    assert (share.low, share.high) == pytest.approx(wilson_interval(0.25, 2))
    assert share_by_prompt({number: [0.0] for number in range(6)}).high == rate_of_counts(0, 6).high


def test_rates_tests_and_families_are_those_of_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multiple = pytest.importorskip("statsmodels.stats.multitest")
    for hits, n in ((0, 30), (7, 30), (30, 30)):
        expected = proportion.proportion_confint(hits, n, method="wilson")
        assert wilson_interval(hits / n, n) == pytest.approx(expected, abs=1e-12)
    for f, g in ((9, 2), (4, 4), (0, 7), (23, 40)):
        assert mcnemar(f, g)[0] == pytest.approx(tables.mcnemar([[5, f], [g, 5]], exact=True).pvalue, rel=1e-9)
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5, "e": 0.002}
    expected = multiple.multipletests(list(p_values.values()), method="holm")[1]
    assert list(holm(p_values).values()) == pytest.approx(expected)


def test_the_bootstrap_of_a_mean_is_scipys_with_the_same_unit():
    generator = np.random.default_rng(1)
    values = generator.normal(0.3, 2.0, size=120)
    mean = mean_by_prompt({number: [value] for number, value in enumerate(values)})
    half = stats.t.ppf(0.975, 119) * values.std(ddof=1) / math.sqrt(120)
    assert mean.value == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert mean_by_prompt({0: [1.0, 2.0]}).low == -math.inf  # one prompt says nothing of others


def test_the_paired_interval_covers_the_truth_in_at_least_94_of_100_samples():
    """48 prompts of which some change for the better and few for the worse; every table that can occur is weighed."""
    for probabilities in ((0.35, 0.25, 0.05, 0.35), (0.1, 0.1, 0.1, 0.7), (0.02, 0.05, 0.01, 0.92)):
        truth = probabilities[2] - probabilities[1]
        generator = np.random.default_rng(2)
        tables, times = np.unique(generator.multinomial(48, probabilities, size=8000), axis=0, return_counts=True)
        contrasts = [paired_contrast(*map(int, table)) for table in tables]
        assert times @ [contrast.low <= truth <= contrast.high for contrast in contrasts] >= 0.94 * 8000


def test_wilsons_interval_covers_the_truth_in_at_least_94_of_100_samples():
    """On average over rates: for a single one the coverage of any interval of counts goes up and down."""
    n = 100
    counts = np.arange(n + 1)
    low, high = np.array([wilson_interval(k / n, n) for k in counts]).T
    truths = np.linspace(0.02, 0.98, 97)
    coverage = [stats.binom.pmf(counts, n, truth) @ ((low <= truth) & (truth <= high)) for truth in truths]
    assert np.mean(coverage) >= 0.94
    assert np.min(coverage) >= 0.93  # of single rates, at this n


def _prompts(seed, num_prompts=40, images=4):
    """Draw 40 prompts of 4 pictures whose chances differ, before and after a change that helps half of the time."""
    generator = np.random.default_rng(seed)
    chances, kept = generator.beta(2, 2, size=(num_prompts, 1)), generator.beta(0.5, 0.5, size=(num_prompts, 1))
    draws = generator.random((3, num_prompts, images))
    before = draws[0] < chances
    return before, np.where(before, draws[1] < kept, draws[2] < 0.05)  # on average .5 before and .275 after


def _pairs(before, after):
    return {n: list(zip(*row, strict=True)) for n, row in enumerate(zip(before.tolist(), after.tolist(), strict=True))}


def test_intervals_by_prompt_cover_the_truth_in_at_least_94_of_100_samples():
    covered = []
    for seed in range(1000):
        before, after = _prompts(seed)
        rate, change = rate_by_prompt(dict(enumerate(before.tolist()))), contrast_by_prompt(_pairs(before, after))
        covered.append((rate.low <= 0.5 <= rate.high, change.low <= -0.225 <= change.high))
    assert (np.mean(covered, axis=0) >= 0.94).all()


@pytest.mark.slow
def test_the_bootstrap_of_a_mean_covers_the_truth_in_at_least_94_of_100_samples_of_12_prompts():
    generator, covered = np.random.default_rng(3), []
    for _ in range(400):
        values = generator.normal(size=(12, 1)) + generator.normal(size=(12, 3))
        mean = mean_by_prompt(dict(enumerate(values.tolist())), draws=1000)
        covered.append(mean.low <= 0 <= mean.high)
    assert np.mean(covered) >= 0.94


def test_the_rate_by_prompt_has_the_variance_of_a_jackknife_over_prompts():
    before, _ = _prompts(0)
    uneven = {n: row[: 1 + n % 4] for n, row in enumerate(before.astype(float).tolist())}
    left_out = [np.mean([x for m, row in uneven.items() if m != n for x in row]) for n in uneven]
    variance = 39 / 40 * np.sum((left_out - np.mean(left_out)) ** 2)
    share, p = share_by_prompt(uneven), np.mean([x for row in uneven.values() for x in row])
    expected = wilson_interval(p, p * (1 - p) / variance, stats.t.ppf(0.975, 39))
    assert (share.low, share.high) == pytest.approx(expected, abs=0.005)


def test_changes_by_prompt_turn_their_signs_and_never_claim_certainty():
    before, after = _prompts(1)
    there, back = contrast_by_prompt(_pairs(before, after)), contrast_by_prompt(_pairs(after, before))
    assert (back.low, back.difference, back.high) == pytest.approx((-there.high, -there.difference, -there.low))
    assert there.difference == pytest.approx(after.mean() - before.mean())
    assert there.low < there.difference < there.high
    assert (there.method, there.num_prompts, there.num_images) == ("newcombe by prompt", 40, 160)


def test_twice_the_same_picture_hardly_changes_a_contrast():
    before, after = (side[:, :1] for side in _prompts(2))
    once, twice = (
        contrast_by_prompt(_pairs(b, a)) for b, a in ((before, after), (before.repeat(2, 1), after.repeat(2, 1)))
    )
    assert once.method == "newcombe" and (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=0.01)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 47, 400])
def test_students_quantile_is_scipys(freedom):
    expected = stats.t.ppf(0.975, freedom)
    assert student_t95(freedom) == pytest.approx(expected, rel=2e-3)
    tail, rest = expanded_tails(freedom + 1)
    assert tail == pytest.approx(stats.norm.cdf(-math.sqrt((freedom + 1) / freedom) * expected), rel=0.05)
    assert tail + rest == pytest.approx(1)


@pytest.mark.parametrize(("margin", "num_prompts"), [(0.05, 73), (0.03, 125), (0.02, 189), (0.01, 381)])
def test_a_margin_needs_so_many_prompts(margin, num_prompts):
    assert smallest_margin(num_prompts) < margin < smallest_margin(num_prompts - 1)
    assert non_inferior(0.0, 0.0, margin, num_prompts, is_rate=True).verdict == "kept"
    assert non_inferior(0.0, 0.0, margin, num_prompts - 1, is_rate=True).verdict == "not testable"


def test_a_loss_beyond_the_margin_is_not_kept_and_a_mean_needs_no_least_number():
    assert non_inferior(-0.03, 0.01, 0.02, 1000, is_rate=True).verdict == "not shown"
    assert non_inferior(-0.4, 0.1, 0.5, 20, is_rate=False).verdict == "kept"


@pytest.mark.parametrize(
    ("flagged", "sensitivity", "specificity", "expected"),
    [(0.13, 0.6, 0.95, 0.145), (0.43, 0.6, 0.95, 0.69), (0.01, 0.9, 0.9, 0.0), (0.99, 0.9, 0.9, 1.0)],
)
def test_rogan_and_gladens_correction(flagged, sensitivity, specificity, expected):
    assert corrected_prevalence(flagged, sensitivity, specificity) == pytest.approx(expected, abs=1e-3)


def test_a_detector_that_guesses_corrects_nothing():
    with pytest.raises(ValueError, match="nothing"):
        corrected_prevalence(0.3, 0.4, 0.6)


def test_four_images_that_half_agree_count_as_1_6():
    assert effective_number(4, 4, 0.5) == pytest.approx(1.6)


def test_every_small_table_has_an_interval_around_its_difference():
    for table in itertools.product(range(4), repeat=4):
        if sum(table):
            contrast = paired_contrast(*table)
            assert -1 <= contrast.low <= contrast.difference + 1e-12
            assert contrast.difference - 1e-12 <= contrast.high <= 1
