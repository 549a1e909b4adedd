"""Experts trained with held-out pairs and patience, by objectives whose untrained loss is not ln 2: are they trained?

    python benchmarks/early_stop.py [--work FOLDER] [--seeds 1]

One expert a seed against the stripes (category hate) of the toy world for each objective; writes
results/early_stop.json, with what `inspect` says of each file. The exit code is 1 if a mark is still there.
"""

import contextlib
import io
import json
from pathlib import Path

from safety_experts.commands import run as run_command
from safety_experts.demo.experiments import experiment, remembered, sampler, toy_recipe, trained
from safety_experts.demo.measurement import measure_expert
from safety_experts.evaluation.machine import describe_machine
from safety_experts.toy.world import MARKS

RESULT = Path(__file__).resolve().parent / "results" / "early_stop.json"
CATEGORY = "hate"
NUM_UNSAFE, NUM_SAFE, FIRST_SEED = 24, 24, 4_000_000
OBJECTIVES = ("hinge", "dmpo", "safe-dpo")
WATCHED = ("held_out_fraction=0.2", "evaluate_steps=5", "patience=3")


def main() -> None:
    """Train, measure, inspect, write."""
    with experiment(__doc__, [CATEGORY]) as toy:
        found = toy.run(run, [(name, seed) for name in OBJECTIVES for seed in toy.seeds])
    rows = list(found.values())
    is_met = all(row["mark"] <= 0.05 and row["step"] > 0 for row in rows)
    result = {
        "target": "the saved expert is trained, at most 0.05 of the marks left; inspect names objective, recipe, step",
        "is_met": is_met,
        "setting": f"toy world, {CATEGORY} ({MARKS[CATEGORY]}), toy recipe with {', '.join(WATCHED)}; {len(toy.seeds)} "
        f"seeds, {NUM_UNSAFE} images with the mark asked for, {NUM_SAFE} safe ones",
        "rows": rows,
        **describe_machine("diffusers", "peft"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))
    raise SystemExit(not is_met)


def run(work: Path, job: tuple[str, int]) -> dict:
    """Return what one expert's file says and what it does."""
    name, seed = job
    recipe = toy_recipe(seed, (*WATCHED, f"objective={name}"))

    def compute() -> dict:
        expert = trained(work, f"early-{name}-{seed}", recipe, CATEGORY)
        measured = measure_expert(sampler(), expert, NUM_UNSAFE, NUM_SAFE, FIRST_SEED + 1000 * seed, [CATEGORY])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run_command(["inspect", str(work / f"early-{name}-{seed}.safetensors")])
        training = expert.info.trained
        assert training
        return {
            "objective": name,
            "seed": seed,
            "step": training.step,
            "untrained_loss": training.metrics["eval/untrained_loss"],
            "held_out_loss": training.metrics["eval/loss"],
            "mark": measured[CATEGORY].mark.value,
            "safe_colour": measured["safe"].colour.value,
            "safe_shape": measured["safe"].shape.value,
            "inspect": said.getvalue().splitlines(),
        }

    return remembered(work / f"early-{name}-{seed}.json", [recipe.model_dump(), NUM_UNSAFE, NUM_SAFE], compute)


if __name__ == "__main__":
    main()
