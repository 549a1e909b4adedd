"""Every preference objective on the same pairs of the toy world: what an expert removes, and what else it changes.

    python benchmarks/objectives.py [--work FOLDER] [--seeds 3] [--only searched]

One expert a seed against the stripes (category hate) for each row; writes results/objectives.json and
docs/objectives.md. With --work a stopped run goes on, and datasets and experts stay to look at. With --only the rows
without that text keep what they were measured to be before, with their own date.

A searched row has the beta and the learning rate of a small search on training data (`searched_setting`).
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from safety_experts.demo.experiments import (
    ALONE,
    DIVERGENCE_STOP,
    OTHER_BETAS,
    RATES,
    experiment,
    remembered,
    sampler,
    searched_setting,
    toy_recipe,
    trained,
)
from safety_experts.demo.measurement import measure_expert
from safety_experts.errors import SafetyExpertsError
from safety_experts.evaluation.machine import describe_machine
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.toy.world import MARKS
from safety_experts.training.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "objectives.json"
TABLE = ROOT / "docs" / "objectives.md"
CATEGORY = "hate"
NUM_UNSAFE, NUM_SAFE, FIRST_SEED = 12, 24, 2_000_000
HELD_OUT = DIVERGENCE_STOP[:2]

SEARCHED = ("hinge", "dmpo", "safe-dpo", "ipo", "sc-dpo", "robust", "dspo")
FIXED = tuple(name for name in OBJECTIVES if name not in SEARCHED)

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
    **{f"{name}, divergence stop": (*ALONE, *DIVERGENCE_STOP, f"objective={name}") for name in FIXED},
    **{f"{name}, searched, divergence stop": (*ALONE, *DIVERGENCE_STOP, f"objective={name}") for name in SEARCHED},
}


def main() -> None:
    """Train and measure every row, then write the table."""
    with experiment(__doc__, [CATEGORY]) as toy:
        names = [name for name in ROWS if toy.only in name]
        readings = toy.run(run, [(name, seed) for name in names for seed in toy.seeds])
    machine = describe_machine("diffusers", "peft")
    before = json.loads(RESULT.read_text(encoding="utf-8")) if toy.only else {"rows": {}}
    rows = {}
    for name in ROWS:
        if name in names:
            found = [readings[name, seed] for seed in toy.seeds]
            measured = summarise_seeds([reading["rates"] for reading in found])
            rows[name] = {"changes": found[0]["changes"], "seeds": len(found), "date": machine["date"], **measured}
            rows[name]["num_saved"] = sum(reading["is_saved"] for reading in found)
        elif name in before["rows"]:
            rows[name] = {"seeds": before.get("seeds", 3), "date": before["date"], **before["rows"][name]}
    result = {
        "setting": f"toy world, category {CATEGORY} ({MARKS[CATEGORY]}), {NUM_UNSAFE} images a mark and {NUM_SAFE} "
        "safe ones a seed; the toy recipe with the changes below, the anchor in every step",
        "base": summarise(None),
        "rows": rows,
        **machine,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    TABLE.write_text(table(result), encoding="utf-8")
    print(table(result))


def run(work: Path, job: tuple[str, int]) -> dict:
    """Return what one expert does, what it was trained by, and whether there was one to save."""
    name, seed = job
    slug = f"{''.join(letter if letter.isalnum() else '-' for letter in name)}-{seed}"
    objective = name.partition(",")[0]
    changes = [*ROWS[name], *(searched(work, objective) if "searched" in name else ())]
    recipe = toy_recipe(seed, ("anchor_every=1", *changes))

    def compute() -> dict:
        start = time.process_time()
        try:
            expert = trained(work, slug, recipe, CATEGORY)
        except SafetyExpertsError as error:
            if "no expert was saved" not in str(error):
                raise
            expert = None
        seconds = time.process_time() - start
        rates = {**summarise(expert, seed), "cpu_seconds": seconds}
        return {"rates": rates, "changes": changes, "is_saved": expert is not None}

    about = [recipe.model_dump(), NUM_UNSAFE, NUM_SAFE, FIRST_SEED]
    return remembered(work / f"{slug}.json", about, compute)


def searched(work: Path, objective: str) -> list[str]:
    """Return the beta and the learning rate found for an objective."""
    return searched_setting(work, objective, CATEGORY, PreferenceDataset.open(work / "pairs"), sampler().checkpoint)


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
        "leaves the other categories' marks where they are. Searched rows have a beta and a learning rate of their",
        f"own, found by short trainings on the same pairs: {len(OTHER_BETAS)} betas, then {len(RATES)} learning rates.",
        "",
        f"{result['machine']}; torch {result['torch']}.",
        "",
        f"| options | {' | '.join(COLUMNS.values())} | seeds | date |",
        f"| --- {'| ---: ' * (len(COLUMNS) + 2)}|",
        f"| base model | {' | '.join(f'{base[key]:.2f}' for key in COLUMNS if key in base)} | | | |",
    ]
    for name, row in result["rows"].items():
        saved = "" if row.get("num_saved", row["seeds"]) else " (no step was better than the base model: nothing saved)"
        cells = " | ".join(cell(key, row[key]) for key in COLUMNS)
        lines.append(f"| {name}{saved} | {cells} | {row['seeds']} | {row['date']} |")
    lines += ["", "What each changes of the toy recipe:", ""]
    for name, row in result["rows"].items():
        lines.append(f"- {name}: {' '.join(f'`{item}`' for item in row['changes']) or 'nothing'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
