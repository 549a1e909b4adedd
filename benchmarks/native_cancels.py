"""Native training cancelled through ComfyUI's API at 10 random steps, resumed, and held against an uninterrupted one.

    python benchmarks/native_cancels.py

A tiny random Wan model of separate files (tests/comfyui/save_small_wan.py) with the toy's CLIP, on a CPU. Exit 1 where
one of the resumed experts differs by a bit.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.comfyui_messages import InterruptedWorkflowError
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.experts.expert import Expert
from safety_experts.experts.expert_file import load_expert
from safety_experts.headless.graphs import Graph, ModelFiles, add_loaders

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "native_cancels.json"
STEPS, CANCELS, SEED = 40, 10, 0
CLIP = "cond_stage_model.transformer."
TEXT = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("red", "green", "blue"))
RECIPE = (
    f"steps={STEPS}\nbatch_size=2\nrank=2\nsave_steps=1000\nheld_out_fraction=0.34\nevaluate_steps=7\nema_decay=0.9"
)


def save_model(folder: Path, comfyui: Path) -> ModelFiles:
    """Write the three files of a tiny model."""
    script = ROOT / "tests" / "comfyui" / "save_small_wan.py"
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True)
    weights = load_file(ensure_toy_checkpoint())
    clip = {key.removeprefix(CLIP): value.clone() for key, value in weights.items() if key.startswith(CLIP)}
    save_file(clip, folder / "clip_l.safetensors")
    return ModelFiles(
        folder / "wan.safetensors", (folder / "clip_l.safetensors",), "sd3", folder / "taesd16.safetensors"
    )


class Trainings:
    """Trainings of one dataset on one server."""

    def __init__(self, server: ComfyServer, files: ModelFiles):
        self.server, self.files = server, files
        graph = Graph()
        links = add_loaders(graph, server, files)
        pairs = graph.add(
            "SafetyExpertsPromptPairs",
            source="text", source__text=TEXT, source__category="violence", source__first_seed=0,
        )  # fmt: skip
        graph.add(
            "SafetyExpertsGeneratePairs",
            model=links.model, clip=links.clip, vae=links.vae, prompt_pairs=(pairs, 0), negative_prompt="", steps=2,
            cfg=3.0, sampler_name="euler", scheduler="simple", width=64, height=64, batch_size=4, dataset_name="pairs",
            checkpoint="(the model says)", preview="off",
        )  # fmt: skip
        server.run(graph)

    def train(self, name: str, *, resume: bool = False, cancel_at: int | None = None) -> Expert:
        """Train, or train until it is cancelled; return what was saved."""
        graph = Graph()
        links = add_loaders(graph, self.server, self.files)
        recipe = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=RECIPE)
        dataset = graph.add("SafetyExpertsLoadDataset", dataset_name="pairs")
        node = graph.add(
            "SafetyExpertsTrain",
            dataset=(dataset, 0), recipe=(recipe, 0), checkpoint="(the one that drew the dataset)", category="all",
            recipe_name="auto", expert_name=name, resume=resume, model=links.model, clip=links.clip, vae=links.vae,
        )  # fmt: skip

        def watch(node_id: str, value: int, total: int) -> None:
            if cancel_at is not None and node_id == node and total == STEPS and value >= cancel_at:
                self.server.interrupt()

        try:
            self.server.run(graph, on_progress=watch)
        except InterruptedWorkflowError:
            if cancel_at is None:
                raise
        loras = self.server.base_directory / "output" / "loras"
        return load_expert(sorted(loras.glob(f"{name}_*.safetensors"))[-1])


def main() -> int:
    wanted = sorted(random.Random(SEED).sample(range(1, STEPS - 2), CANCELS))
    rows = []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(cpu=True) as server:
        trainings = Trainings(server, save_model(Path(folder), server.comfyui))
        whole = trainings.train("whole")
        for step in wanted:
            stopped = trainings.train(f"at_{step}", cancel_at=step)
            resumed = trainings.train(f"at_{step}", resume=True)
            assert stopped.info.trained and resumed.info.trained
            rows.append(
                {
                    "cancelled_when_shown_step": step,
                    "stopped_after_step": stopped.info.trained.step,
                    "saved_as_unfinished": not stopped.info.trained.finished,
                    "resumed_equals_uninterrupted": resumed.tensors_sha256() == whole.tensors_sha256(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        server.check_log()
    equal = sum(row["resumed_equals_uninterrupted"] for row in rows)
    result = {"what": __doc__.splitlines()[0], "steps": STEPS, "equal": equal, "of": len(rows), "cancels": rows}
    RESULT.write_text(json.dumps(result | describe_machine(), indent=2) + "\n", encoding="utf-8")
    return int(equal != len(rows))


if __name__ == "__main__":
    raise SystemExit(main())
