"""Training an expert on a model that ComfyUI loads, by its Train Safety Expert."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..demo.comfyui import ComfyServer
from ..errors import InputError, SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import load_expert, save_expert
from ..files import only_writer
from ..preferences.dataset import PreferenceDataset
from ..training.recipe import Recipe
from ..training.trainer import TrainingStoppedError, resume_path
from .graphs import Graph, ModelFiles, add_experts, add_loaders
from .session import Comfy, run_graph, tidied, tidy, work_folder

DATASET_VARIABLE = "SAFETY_EXPERTS_DATASET"  # nodes/host/datasets.py
_NAME = "expert"
_OF_DATASET = "(the one that drew the dataset)"


@dataclass(frozen=True)
class Trained:
    """What came out: the expert, and the metrics of each step taken."""

    expert: Expert
    records: list[dict[str, float]]
    stopped: bool

    @property
    def step(self) -> int:
        trained = self.expert.info.trained
        return trained.step if trained else len(self.records)


def train_in_comfyui(
    comfy: Comfy,
    files: ModelFiles,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out: Path,
    *,
    category: str | None = None,
    with_experts: Sequence[Path] = (),
    resume: bool = False,
) -> Trained:
    """Train and save the expert to `out`; a stopped training's state lies beside it, as `train_expert` leaves it.

    Raises:
        InputError: the node refuses the model, the dataset or the recipe, in its own words.
        TrainingStoppedError: stopped before there was an expert.
        SafetyExpertsError: the work failed; what was kept is at its place.
    """
    work = work_folder(out)
    loras = work / "output" / "loras"
    with only_writer(out):
        if not resume:
            tidy(work, keep_log=False)
        elif (state := _state_to_resume(out, loras)).parent != loras:
            tidy(work, keep_log=False)
            loras.mkdir(parents=True)
            shutil.move(state, loras / f"{_NAME}_00001_.resume")

        def build(server: ComfyServer) -> tuple[Graph, str]:
            graph = Graph()
            links = add_loaders(graph, server, files)
            model = add_experts(graph, server, links.model, [(path, 1.0) for path in with_experts])
            overrides = "\n".join(
                f"{name}={json.dumps(value)}" for name, value in recipe.model_dump(mode="json").items()
            )
            options = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=overrides)
            opened = graph.add("SafetyExpertsLoadDataset", dataset_name=dataset.folder.name)
            return graph, graph.add(
                "SafetyExpertsTrain",
                dataset=(opened, 0),
                checkpoint=_OF_DATASET,
                category="all",
                own_category=category or "",
                recipe_name="auto",
                recipe=(options, 0),
                expert_name=_NAME,
                resume=resume,
                model=model,
                clip=links.clip,
                vae=links.vae,
            )

        with tidied(work):
            try:
                finished = run_graph(comfy, work, build, {DATASET_VARIABLE: str(dataset.folder.resolve())})
            finally:
                taken = _take(loras, out)
        if taken is None:
            if finished:
                raise SafetyExpertsError(f"ComfyUI ended without writing an expert; {out} was not written")
            raise TrainingStoppedError("stopped before the first training step; nothing was saved")
        return Trained(*taken, stopped=not finished)


def _state_to_resume(out: Path, loras: Path) -> Path:
    """Return the state beside the expert, or the one that a killed command left with its server."""
    left = sorted(loras.glob("*.resume"))
    if left:
        return left[-1]
    if resume_path(out).exists():
        return resume_path(out)
    why = "its training is finished" if out.exists() else "no training of this name was stopped"
    raise InputError(f"nothing to resume for {out}: {why}; train without resuming")


def _take(loras: Path, out: Path) -> tuple[Expert, list[dict[str, float]]] | None:
    """Bring the newest expert and state of the server to their places."""
    states, experts = sorted(loras.glob("*.resume")), sorted(loras.glob(f"{_NAME}_*_.safetensors"))
    if states:
        shutil.move(states[-1], resume_path(out))
    elif experts:
        resume_path(out).unlink(missing_ok=True)
    if not experts:
        return None
    expert = replace(load_expert(experts[-1]), name=out.stem)
    save_expert(expert, out)
    metrics = experts[-1].with_suffix(".metrics.jsonl")
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return expert, [json.loads(line) for line in lines]
