"""Training an expert on a model that ComfyUI loads, by its Train Safety Expert."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..demo.comfyui import ComfyServer
from ..errors import InputError, SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import load_expert, save_expert
from ..files import only_writer
from ..preferences.dataset import PreferenceDataset
from ..training.event_lines import follow_line
from ..training.events import StepRecord, TrainingEvents
from ..training.metrics import Metrics
from ..training.recipe import Recipe
from ..training.retained import RetainedPrompts, text_of_groups
from ..training.trainer import TrainingStoppedError, TrainResult, resume_path
from .graphs import Graph, ModelFiles, add_experts, add_loaders
from .session import Comfy, run_graph, tidied, tidy, work_folder

_NAME = "expert"
_OF_DATASET = "(the one that drew the dataset)"


def train_in_comfyui(
    comfy: Comfy,
    files: ModelFiles,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out: Path,
    *,
    events: TrainingEvents | None = None,
    category: str | None = None,
    with_experts: Sequence[Path] = (),
    resume: bool = False,
    retain: RetainedPrompts | None = None,
) -> TrainResult:
    """Train and save the expert to `out`; a stopped training's state lies beside it, as `train_expert` leaves it.

    Args:
        comfy: its `should_stop` is asked, not that of the events.
        events: as of `train_expert`.

    Raises:
        InputError: the node refuses the model, the dataset or the recipe, in its own words.
        TrainingStoppedError: stopped before there was an expert.
        SafetyExpertsError: the work failed; what was kept is at its place.
    """
    events = events or TrainingEvents()
    work = work_folder(out)
    loras = work / "output" / "loras"
    lines = work / "training" / "events.jsonl"
    with only_writer(out):
        if not resume:
            tidy(work, keep_log=False)
        elif (state := _state_to_resume(out, loras)).parent != loras:
            tidy(work, keep_log=False)
            loras.mkdir(parents=True)
            shutil.move(state, loras / f"{_NAME}_00001_.resume")
        shutil.rmtree(lines.parent, ignore_errors=True)
        lines.parent.mkdir(parents=True)
        following = _Following(lines, events)

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
                sample_every=events.sample_every,
                retain=text_of_groups(retain or {}),
            )

        def should_stop() -> bool:  # asked again and again
            following.read()
            return comfy.should_stop()

        with tidied(work):
            try:
                paths = {"dataset": dataset.folder.resolve(), "training_events": lines}
                finished = run_graph(replace(comfy, should_stop=should_stop), work, build, paths)
                following.read()
            finally:
                following.close()
                taken = _take(loras, out)
        if taken is None:
            if finished:
                raise SafetyExpertsError(f"ComfyUI ended without writing an expert; {out} was not written")
            raise TrainingStoppedError("stopped before the first training step; nothing was saved")
        expert, records = taken
        assert expert.info.trained
        return TrainResult(expert, out, records, expert.info.trained.step, stopped=not finished)


class _Following:
    """Hands on what the node writes of its training, metrics to the sinks of `events` too."""

    def __init__(self, lines: Path, events: TrainingEvents):
        self._lines, self._sinks = lines, events.sinks
        self._is_started, self._position = False, 0

        def on_resume(records: Sequence[Metrics]) -> None:
            self._start(records)
            events.on_resume(records)

        def on_step(record: StepRecord) -> None:
            if record.stage == "train":
                self._start(())
                for sink in self._sinks:
                    sink.add(record.step, record.metrics)
            events.on_step(record)

        self._events = replace(events, on_resume=on_resume, on_step=on_step)

    def _start(self, records: Sequence[Metrics]) -> None:
        if not self._is_started:
            for sink in self._sinks:
                sink.start(records)
        self._is_started = True

    def read(self) -> None:
        """Hand on the lines since the last time; half a line waits for its end."""
        if not self._lines.exists():
            return
        with open(self._lines, "rb") as file:
            file.seek(self._position)
            *whole, _ = file.read().split(b"\n")
        for line in whole:
            self._position += len(line) + 1
            follow_line(line.decode(), self._events)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


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
