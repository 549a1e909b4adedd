"""A finished training queued again: on the same server, where ComfyUI's cache does not answer, and on a fresh one.

    python benchmarks/queued_again.py [--steps 20]

The expert is trained on eight rendered pairs of the toy world through a real server. Then the same graph is queued with
another `sample_every`, which changes nothing of the expert, and once more after the server was started anew.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.headless.graphs import Graph
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import COLOURS, prompt_for, render_scene

RESULT = Path(__file__).resolve().parent / "results" / "queued_again.json"
NAME = "queued_again"


def main() -> None:
    """Train, queue again twice, print and write the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "server"
        render_pairs(base / "datasets" / NAME)
        with ComfyServer(base, cpu=True) as server:
            checkpoint = server.add_model(ensure_toy_checkpoint())
            seconds["trained"] = queue(server, checkpoint, arguments.steps, sample_every=0)
            seconds["queued_again"] = queue(server, checkpoint, arguments.steps, sample_every=1)
        with ComfyServer(base, cpu=True) as server:
            seconds["queued_on_a_fresh_server"] = queue(server, checkpoint, arguments.steps, sample_every=0)
        experts = [path.name for path in (base / "output" / "loras").glob("*.safetensors")]
    result = {
        "claim": "a finished training queued again is given back in seconds",
        "steps": arguments.steps,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "experts_written": len(experts),
        **describe_machine(),
    }
    print(json.dumps(result, indent=2))
    if len(experts) != 1:
        raise SystemExit("it trained again")
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def render_pairs(folder: Path) -> None:
    """Write a dataset of one pair a colour, with and without thorns."""
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}, "rendered", ""))
    for seed, colour in enumerate(COLOURS):
        pair = PromptPair(prompt_for(colour, "circle", "thorns"), prompt_for(colour, "circle"), ("violence",), seed)
        chosen, rejected = (render_scene(colour, "circle", mark, seed) for mark in (None, "thorns"))
        dataset.add(pair, chosen, rejected)


def queue(server: ComfyServer, checkpoint: str, steps: int, sample_every: int) -> float:
    """Return how long the server took for the training's graph."""
    graph = Graph()
    graph.add(
        "SafetyExpertsTrain",
        dataset=(graph.add("SafetyExpertsLoadDataset", dataset_name=NAME), 0),
        recipe=(graph.add("SafetyExpertsRecipe", recipe="toy", overrides=f"steps={steps}"), 0),
        expert_name=NAME,
        checkpoint=checkpoint,
        category="all",
        recipe_name="toy",
        sample_every=sample_every,
    )
    started = time.perf_counter()
    server.run(graph)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
