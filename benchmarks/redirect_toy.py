"""The redirect recipe on the toy world: does it end within its leak budget, and what does its expert draw?

    python benchmarks/redirect_toy.py [--work FOLDER] [--categories hate …] [--seeds 1] [--prefill]

The other six categories are retained. Only what the recipe says is the model's own is set: learning rate, batch, no
warm-up, and the guidance the toy is drawn with. Writes results/redirect_toy.json after every expert; with --work what
is measured there is not measured again. --prefill also draws on from noised unsafe pictures.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safety_experts.demo.experiments import remembered, sampler
from safety_experts.demo.measurement import measure_expert
from safety_experts.errors import SafetyExpertsError
from safety_experts.evaluation.judges import choose_judge
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.prefill import prefill_test
from safety_experts.evaluation.rings import mean_of
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.toy.world import MARKS
from safety_experts.training.recipe import load_recipe
from safety_experts.training.redirect import residual_target
from safety_experts.training.trainer import train_expert

RESULT = Path(__file__).resolve().parent / "results" / "redirect_toy.json"
PAIRS_PER_CATEGORY, GUIDANCE = 32, 3.0
NUM_UNSAFE, NUM_SAFE, FIRST_SEED = 12, 24, 2_000_000
OF_THE_MODEL = ["learning_rate=0.002", "batch_size=8", "warmup_steps=0", f"guidance={GUIDANCE:g}", "steps=200"]


def run(work: Path, category: str, seed: int, with_prefill: bool) -> dict:
    """Return how a training ended, its measurements, and what the expert draws."""
    recipe = load_recipe("redirect", [*OF_THE_MODEL, f"seed={seed}"])
    dataset = PreferenceDataset.open(work / "pairs32")

    def train() -> dict:
        start = time.process_time()
        try:
            result = train_expert(
                sampler().checkpoint, dataset, recipe, work / f"{category}-{seed}.safetensors", category=category,
                device="cpu",
            )  # fmt: skip
        except SafetyExpertsError as error:
            return {"ended": str(error), "cpu_seconds": round(time.process_time() - start)}
        seconds = round(time.process_time() - start)
        found = measure_expert(sampler(), result.expert, NUM_UNSAFE, NUM_SAFE, FIRST_SEED + 1000 * seed)
        others = {name: found[name].mark.value for name in MARKS if name != category}
        worst = min(others, key=lambda name: others[name])
        kept = min(found["safe"].colour.value, found["safe"].shape.value, others[worst])
        measured = [record for record in result.records if "eval/leak" in record]
        return {
            "ended": result.shortfall or "target reached within the budget",
            "step": result.step,
            "cpu_seconds": seconds,
            "residual": result.records[result.step - 1]["eval/residual"],
            "leak": result.records[result.step - 1]["eval/leak"],
            "worst_leak": result.records[result.step - 1]["eval/worst_leak"],
            "measurements": [
                {
                    name.removeprefix("eval/"): round(value, 5)
                    for name, value in record.items()
                    if name.startswith(("eval/residual", "eval/leak", "eval/worst"))
                }
                for record in measured
            ],
            "mark": found[category].mark.value,
            "unsafe_colour": found[category].colour.value,
            "unsafe_shape": found[category].shape.value,
            "safe_colour": found["safe"].colour.value,
            "safe_shape": found["safe"].shape.value,
            "worst_other_mark": others[worst],
            "that_mark": MARKS[worst],
            "h": mean_of(found[category].mark.value, 1 - kept),
        }

    row = remembered(work / f"{category}-{seed}.json", [recipe.model_dump(mode="json"), NUM_UNSAFE, NUM_SAFE], train)
    if with_prefill and "step" in row:
        from safety_experts.experts.expert_file import load_expert

        expert = load_expert(work / f"{category}-{seed}.safetensors")
        judge = choose_judge("toy-oracle", {"rule": "own-mark"})

        def draw_on() -> list[dict]:
            points = prefill_test(
                expert, sampler().checkpoint, dataset, judge,
                category=category, num_pairs=8, num_steps=12, guidance=GUIDANCE,
            )  # fmt: skip
            return [point.to_json() for point in points]

        row["prefill"] = remembered(work / f"prefill-{category}-{seed}.json", expert.file_sha256, draw_on)
    return row


def main() -> None:
    """Train and measure every expert; write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for dataset, experts and readings (default: a temporary one)")
    parser.add_argument("--categories", nargs="+", default=["hate"], choices=list(MARKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prefill", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        sampler().build_dataset(work / "pairs32", PAIRS_PER_CATEGORY, tuple(MARKS))
        for category in arguments.categories:
            for seed in range(arguments.seeds):
                rows[f"{category}, seed {seed}"] = run(work, category, seed, arguments.prefill)
                write(rows)


def write(rows: dict[str, dict]) -> None:
    result = {
        "setting": f"toy world, recipe redirect with {' '.join(OF_THE_MODEL)}; {PAIRS_PER_CATEGORY} pairs a category, "
        f"{NUM_UNSAFE} images a mark and {NUM_SAFE} safe ones",
        "residual_target": residual_target(GUIDANCE),
        "experts": rows,
        **describe_machine("diffusers", "peft"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: {k: v for k, v in row.items() if k != "measurements"} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
