"""Every preference objective on the same pairs of the toy world: what an expert removes, and what else it changes.

    python benchmarks/objectives.py [--work FOLDER] [--seeds 3]

One expert a seed against the stripes (category hate) for each row; writes results/objectives.json and
docs/objectives.md. With --work a stopped run goes on, and datasets and experts stay to look at.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from safety_experts.demo.experiments import experiment, remembered, sampler, toy_recipe, trained
from safety_experts.demo.measurement import measure_expert
from safety_experts.evaluation.machine import describe_machine
from safety_experts.toy.world import MARKS
from safety_experts.training.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "objectives.json"
TABLE = ROOT / "docs" / "objectives.md"
CATEGORY = "hate"
NUM_UNSAFE, NUM_SAFE, FIRST_SEED = 12, 24, 2_000_000
ALONE = ("anchor_weight=0", "sft_weight=0")
HELD_OUT = ("held_out_fraction=0.2", "evaluate_steps=3")
DIVERGENCE_STOP = (*HELD_OUT, "max_chosen_increase=0.02")

ROWS: dict[str, Sequence[str]] = {
    "sigmoid alone (Diffusion-DPO, AlignGuard)": ALONE,
    "sigmoid, winner preserving (Diffusion-SDPO)": (*ALONE, "winner_preserving=1.0"),
    "sigmoid, early stop": (*ALONE, *HELD_OUT, "patience=3"),
    "sigmoid + anchor of 100": ("anchor_weight=100", "sft_weight=0"),
    "sigmoid + anchor of 100, divergence stop": ("anchor_weight=100", "sft_weight=0", *DIVERGENCE_STOP),
    "sigmoid + SFT": ("anchor_weight=0",),
    "SFT, no preference loss": ("objective={sigmoid: 0}", "anchor_weight=0"),
    "sigmoid + anchor + SFT: the toy recipe": (),
    "DUO's sampling: no prompt, anchor on noise": (
        "sft_weight=0",
        "anchor_weight=100",
        "anchor_samples=noise",
        "shared_timestep=false",
        "caption_dropout_fraction=1.0",
    ),
    **{f"{name}, divergence stop": (*ALONE, *DIVERGENCE_STOP, f"objective={name}") for name in OBJECTIVES},
}


def main() -> None:
    """Train and measure every row, then write the table."""
    with experiment(__doc__) as toy:
        readings = toy.run(run, [(name, seed) for name in ROWS for seed in toy.seeds])
    base = summarise(None)
    rows = {name: summarise_seeds([readings[name, seed] for seed in toy.seeds]) for name in ROWS}
    result = {
        "setting": f"toy world, category {CATEGORY} ({MARKS[CATEGORY]}), {len(toy.seeds)} seeds, {NUM_UNSAFE} images "
        f"a mark and {NUM_SAFE} safe ones a seed; the toy recipe with the changes below",
        "base": base,
        "rows": {name: {"changes": list(ROWS[name]), **row} for name, row in rows.items()},
        **describe_machine("diffusers", "peft"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    TABLE.write_text(table(result), encoding="utf-8")
    print(table(result))


def run(work: Path, job: tuple[str, int]) -> dict[str, float]:
    """Return what one expert does."""
    name, seed = job
    slug = f"{''.join(letter if letter.isalnum() else '-' for letter in name)}-{seed}"
    recipe = toy_recipe(seed, ROWS[name])

    def compute() -> dict[str, float]:
        start = time.process_time()
        expert = trained(work, slug, recipe, CATEGORY)
        seconds = time.process_time() - start
        return {**summarise(expert, seed), "cpu_seconds": seconds}

    return remembered(work / f"{slug}.json", [recipe.model_dump(), NUM_UNSAFE, NUM_SAFE, FIRST_SEED], compute)


def summarise(expert, seed: int = 0) -> dict[str, float]:
    """Return the rates that the table shows."""
    measured = measure_expert(sampler(), expert, NUM_UNSAFE, NUM_SAFE, FIRST_SEED + 1000 * seed)
    own, safe = measured[CATEGORY], measured["safe"]
    others = [measured[category].mark.value for category in MARKS if category != CATEGORY]
    return {
        "mark": own.mark.value,
        "unsafe_colour": own.colour.value,
        "unsafe_shape": own.shape.value,
        "safe_colour": safe.colour.value,
        "safe_shape": safe.shape.value,
        "safe_mark": safe.mark.value,
        "other_marks": statistics.fmean(others),
        "least_other_mark": min(others),
    }


def summarise_seeds(readings: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, least and largest value over the seeds."""
    return {
        key: {
            "mean": round(statistics.fmean(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for key in readings[0]
        for values in [[reading[key] for reading in readings]]
    }


COLUMNS = {
    "mark": "mark shown",
    "unsafe_colour": "unsafe prompts: colour",
    "unsafe_shape": "shape",
    "safe_colour": "safe prompts: colour",
    "safe_shape": "shape",
    "other_marks": "other marks",
    "cpu_seconds": "CPU seconds",
}


def table(result: dict) -> str:
    """Return docs/objectives.md."""

    def cell(key: str, value: dict[str, float]) -> str:
        if key == "cpu_seconds":
            return f"{value['mean']:.0f}"
        spread = "" if value["min"] == value["max"] else f" ({value['min']:.2f} to {value['max']:.2f})"
        return f"{value['mean']:.2f}{spread}"

    base = result["base"]
    lines = [
        "# Objectives on the toy world",
        "",
        f"Written by `benchmarks/objectives.py`. {result['setting'][0].upper()}{result['setting'][1:]}.",
        "Mean over the seeds, least and largest in brackets. A good expert shows no mark, keeps colour and shape, and",
        "leaves the other categories' marks where they are.",
        "",
        f"Date {result['date']}; {result['machine']}; torch {result['torch']}.",
        "",
        f"| options | {' | '.join(COLUMNS.values())} |",
        f"| --- {'| ---: ' * len(COLUMNS)}|",
        f"| base model | {' | '.join(f'{base[key]:.2f}' for key in COLUMNS if key in base)} | |",
    ]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {' | '.join(cell(key, row[key]) for key in COLUMNS)} |")
    lines += ["", "What each changes of the toy recipe:", ""]
    for name, row in result["rows"].items():
        lines.append(f"- {name}: {' '.join(f'`{item}`' for item in row['changes']) or 'nothing'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
