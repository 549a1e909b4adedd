"""The whole product on the toy world: the three example workflows through a real ComfyUI, then before and after.

Every model is measured the same way: the pair generator draws each evaluation prompt pair with it, so that its
"rejected" images show what it does with unsafe prompts and its "chosen" ones what it does with safe prompts.
"""

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..errors import InputError, SafetyExpertsError
from ..preferences.dataset import PreferenceDataset
from ..toy.world import taxonomy
from .comfyui import ComfyServer
from .measurement import Measurement, measure_dataset
from .toy_checkpoint import ensure_toy_checkpoint

WORKFLOWS_FOLDER = Path(__file__).resolve().parents[1] / "example_workflows" / "api"
EVALUATION_SEED = 1_000_000  # far from the training pairs' seeds
_MARKER = ".safety-experts-demo"

Graph = dict[str, dict]
OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class DemoSize:
    """How many pairs to train on and to measure with, for each category.

    16 to measure with are the fewest whose interval can hold a promise: 16 of 16 is at least 81 %, none of 16 at most
    19 % (Wilson, 95 %), against the promised 80 % and 20 %.
    """

    training_pairs: int = 24
    evaluation_pairs: int = 16


FULL, FAST = DemoSize(), DemoSize(training_pairs=16, evaluation_pairs=8)


@dataclass
class DemoResult:
    """What was drawn and measured. Keys of `measurements` and `datasets` are model names, the base model first."""

    categories: Sequence[str]
    measurements: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    datasets: dict[str, PreferenceDataset] = field(default_factory=dict)
    experts: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def load_workflow(name: str) -> Graph:
    """Return a shipped workflow in ComfyUI's API format."""
    return json.loads((WORKFLOWS_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def set_inputs(graph: Graph, class_type: str, index: int = 0, **values: object) -> None:
    """Change inputs of the `index`-th node of a type; a dot in an input's name is written as two underscores."""
    nodes = [node for node in graph.values() if node["class_type"] == class_type]
    nodes[index]["inputs"].update({name.replace("__", "."): value for name, value in values.items()})


def run_pipeline(
    out: Path,
    categories: Sequence[str],
    size: DemoSize,
    *,
    native: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> DemoResult:
    """Build pairs, train one expert a category, merge them, and draw every evaluation prompt with every model.

    Everything lies under `out`/comfyui, the server's base directory, which is emptied first.

    Args:
        native: train on the MODEL of a loader instead of by checkpoint.

    Raises:
        InputError: `out` is a folder of something else.
        SafetyExpertsError: ComfyUI did not start, or a workflow failed; the message is the node's.
    """
    base = _fresh_folder(out.resolve()) / "comfyui"
    result = DemoResult(categories)
    with ComfyServer(base) as server:
        checkpoint = server.add_model(ensure_toy_checkpoint())

        def run(stage: str, graph: Graph) -> None:
            start = time.monotonic()
            on_progress(stage, 0, 1)
            server.run(graph, on_progress=lambda _, done, total: on_progress(stage, done, total))
            result.seconds[stage] = round(time.monotonic() - start, 1)

        build = load_workflow("1_build_preference_dataset")
        set_inputs(build, "SafetyExpertsPromptPairs", source__taxonomy=_taxonomy(categories, size.training_pairs))
        run("build preference dataset", build)
        generator = next(node for node in build.values() if node["class_type"] == "SafetyExpertsGeneratePairs")

        for category in categories:
            train = load_workflow("2_train_expert")
            set_inputs(train, "SafetyExpertsTrain", category=category, expert_name=category)
            if native:
                loader = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
                train["base"] = loader
                set_inputs(train, "SafetyExpertsTrain", model=["base", 0], clip=["base", 1], vae=["base", 2])
            run(f"train {category}", train)
            result.experts[category] = _saved_expert(server, category)

        for model, method in (("weighted sum", "linear"), ("row Co-Merge", "co-merge")):
            merge = _merge_graph(categories, method, build)
            run(f"merge and apply: {model}", merge)
            result.experts[model] = _saved_expert(server, method)

        for model in ("base", *result.experts):
            expert = result.experts.get(model)
            name = f"evaluation/{model.replace(' ', '_')}"
            graph = _evaluation_graph(generator, checkpoint, expert, categories, size.evaluation_pairs, name)
            run(f"draw evaluation prompts: {model}", graph)
            result.datasets[model] = PreferenceDataset.open(base / "datasets" / name)
            result.measurements[model] = measure_dataset(result.datasets[model])
        server.check_log()
    return result


def _fresh_folder(out: Path) -> Path:
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise InputError(f"{out} is not empty and no earlier demo wrote it; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).touch()
    return out


def _taxonomy(categories: Sequence[str], pairs_per_category: int) -> str:
    return yaml.safe_dump(taxonomy(list(categories), pairs_per_category), sort_keys=False)


def _saved_expert(server: ComfyServer, name: str) -> Path:
    path = server.base_directory / "output" / "loras" / f"{name}_00001_.safetensors"
    if not path.is_file():
        raise SafetyExpertsError(f"the workflow ended without writing {path}; see {server.log_path}")
    return path


def _merge_graph(categories: Sequence[str], method: str, build: Graph) -> Graph:
    graph = load_workflow("3_merge_and_apply")
    for index, category in enumerate(categories):
        set_inputs(graph, "SafetyExpertsLoad", index, expert_name=f"{category}_00001_.safetensors")
    set_inputs(graph, "SafetyExpertsSave", expert_name=method)
    if method == "co-merge":
        pairs = next(node for node in build.values() if node["class_type"] == "SafetyExpertsPromptPairs")
        graph["calibration"] = copy.deepcopy(pairs)
        loader = next(number for number, node in graph.items() if node["class_type"] == "CheckpointLoaderSimple")
        set_inputs(
            graph,
            "SafetyExpertsMerge",
            method=method,
            method__model=[loader, 0],
            method__clip=[loader, 1],
            method__prompt_pairs=["calibration", 0],
            method__num_prompts=32,
            method__calibration_steps=6,
            method__width=64,
            method__height=64,
        )
    return graph


def _evaluation_graph(
    generator: dict, checkpoint: str, expert: Path | None, categories: Sequence[str], num_pairs: int, name: str
) -> Graph:
    model, clip = ["checkpoint", 0], ["checkpoint", 1]
    prompts = {
        "source": "taxonomy",
        "source.taxonomy": _taxonomy(categories, num_pairs),
        "source.first_seed": EVALUATION_SEED,
    }
    graph: Graph = {
        "checkpoint": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "prompts": {"class_type": "SafetyExpertsPromptPairs", "inputs": prompts},
    }
    if expert:
        strengths = load_workflow("3_merge_and_apply")
        apply = next(node for node in strengths.values() if node["class_type"] == "SafetyExpertsApply")
        graph["expert"] = {"class_type": "SafetyExpertsLoad", "inputs": {"expert_name": expert.name}}
        graph["apply"] = copy.deepcopy(apply)
        graph["apply"]["inputs"].update(model=model, clip=clip, expert=["expert", 0])
        model, clip = ["apply", 0], ["apply", 1]
    inputs = {
        **generator["inputs"],
        "model": model,
        "clip": clip,
        "vae": ["checkpoint", 2],
        "prompt_pairs": ["prompts", 0],
        "checkpoint": checkpoint,
        "dataset_name": name,
    }
    graph["generate"] = {"class_type": "SafetyExpertsGeneratePairs", "inputs": inputs}
    return graph
