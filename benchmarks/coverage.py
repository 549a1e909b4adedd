"""How often the 95 % intervals of a report cover the truth: exact for single pictures, by simulation for several.

- wilson: one picture a prompt, every count weighed, rates .02 to .98;
- newcombe: paired tables of 48 and 100 prompts, simulated;
- rates and changes by prompt: k pictures of each of G prompts whose chances differ (a beta distribution);
- means: the change of a skewed metric by prompt, as bootstrapped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import (
    contrast_by_prompt,
    mean_by_prompt,
    paired_contrast,
    rate_by_prompt,
    wilson_interval,
)
from scipy import stats

RESULT = Path(__file__).resolve().parent / "results" / "coverage.json"
# Chance of an unsafe picture over prompts: (a, b) of a beta distribution. Then which share of a prompt's unsafe
# pictures stays unsafe, and how many of its safe ones become unsafe.
CHANCES = ((2, 2), (0.5, 0.5), (4, 1), (0.3, 2.7), (9, 1), (0.1, 3.2))
CHANGES = ((2, 2, 0.5, 0.05), (4, 1, 0.3, 0.02), (0.3, 2.7, 0.5, 0.01), (9, 1, 0.95, 0.3), (0.5, 0.5, 0.2, 0.1))


def main() -> None:
    """Simulate, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="of each setting (default: 2000)")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = {
        "samples_of_a_setting": arguments.samples,
        "wilson": {f"n {n}": wilson(n) for n in (24, 48, 100, 200, 400)},
        "newcombe": newcombe(arguments.samples),
        "rates_by_prompt": summary(rates_by_prompt(arguments.samples)),
        "changes_by_prompt": summary(changes_by_prompt(arguments.samples)),
        "means_by_prompt": summary(means_by_prompt(arguments.samples // 4)),
        "machine": describe_machine("numpy", "scipy"),
    }
    print(json.dumps(result, indent=1))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def wilson(n: int) -> dict:
    """Return mean and least coverage over rates, exactly."""
    counts = np.arange(n + 1)
    low, high = np.array([wilson_interval(k / n, n) for k in counts]).T
    truths = np.linspace(0.02, 0.98, 193)
    coverage = [stats.binom.pmf(counts, n, truth) @ ((low <= truth) & (truth <= high)) for truth in truths]
    return {"mean": round(float(np.mean(coverage)), 4), "least": round(float(np.min(coverage)), 4)}


def newcombe(samples: int) -> dict:
    found = {}
    tables = ((0.35, 0.25, 0.05, 0.35), (0.1, 0.1, 0.1, 0.7), (0.02, 0.05, 0.01, 0.92), (0.3, 0.4, 0.02, 0.28))
    for n in (48, 100):
        for probabilities in tables:
            truth = probabilities[2] - probabilities[1]
            drawn = np.random.default_rng(2).multinomial(n, probabilities, size=samples)
            contrasts = [paired_contrast(*map(int, table)) for table in drawn]
            found[f"n {n}, {probabilities}"] = float(np.mean([c.low <= truth <= c.high for c in contrasts]))
    return summary(found.items())


def settings() -> Iterator[tuple[int, int]]:
    """Yield (prompts, pictures of each)."""
    return ((prompts, images) for prompts in (10, 20, 48, 100) for images in (2, 4))


def rates_by_prompt(samples: int) -> Iterator[tuple[str, float]]:
    generator = np.random.default_rng(3)
    for prompts, images in settings():
        for a, b in CHANCES:
            covered = 0
            for _ in range(samples):
                chances = generator.beta(a, b, size=(prompts, 1))
                rate = rate_by_prompt(dict(enumerate((generator.random((prompts, images)) < chances).tolist())))
                covered += rate.low <= a / (a + b) <= rate.high
            yield f"{prompts} prompts of {images}, beta({a}, {b})", covered / samples


def changes_by_prompt(samples: int) -> Iterator[tuple[str, float]]:
    generator = np.random.default_rng(4)
    for prompts, images in settings():
        for a, b, stays, becomes in CHANGES:
            mean = a / (a + b)
            truth, covered = mean * stays + (1 - mean) * becomes - mean, 0
            for _ in range(samples):
                chances = generator.beta(a, b, size=(prompts, 1))
                kept = generator.beta(stays, 1 - stays, size=(prompts, 1))
                draws = generator.random((3, prompts, images))
                before = draws[0] < chances
                after = np.where(before, draws[1] < kept, draws[2] < becomes)
                pairs = np.stack([before, after], axis=2).tolist()
                contrast = contrast_by_prompt(
                    {number: [tuple(pair) for pair in row] for number, row in enumerate(pairs)}
                )
                covered += contrast.low <= truth <= contrast.high
            yield f"{prompts} prompts of {images}, beta({a}, {b}), {stays} stay, {becomes} become", covered / samples


def means_by_prompt(samples: int) -> Iterator[tuple[str, float]]:
    """Give each prompt a skewed mean of its own (a gamma distribution) and its pictures normal noise."""
    generator = np.random.default_rng(5)
    for prompts, images in settings():
        for shape in (2.0, 20.0):
            covered = 0
            for _ in range(samples):
                values = generator.gamma(shape, size=(prompts, 1)) + generator.normal(size=(prompts, images))
                mean = mean_by_prompt(dict(enumerate(values.tolist())))
                covered += mean.low <= shape <= mean.high
            yield f"{prompts} prompts of {images}, gamma({shape:g})", covered / samples


def summary(found) -> dict:
    by_setting = {name: round(covered, 4) for name, covered in found}
    values = list(by_setting.values())
    return {"mean": round(float(np.mean(values)), 4), "least": min(values), "by_setting": by_setting}


if __name__ == "__main__":
    main()
