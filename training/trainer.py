"""Train one expert: a LoRA on a checkpoint's UNet, from a preference dataset, by a recipe.

The reference of the preference objective is the same UNet with the LoRA off; images and prompts are encoded once.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint_id import CheckpointId
from ..errors import SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import save_expert
from ..experts.info import ExpertInfo, Trained
from ..files import remove_leftovers
from ..models.checkpoint import Checkpoint, load_checkpoint
from ..preferences.dataset import PreferenceDataset
from .batches import BatchPlan
from .held_out import HeldOut, split_pairs
from .lora import read_layers
from .memory import memory_errors_explained
from .metrics import MetricsSink
from .preparation import compute_dtype, encode_dataset, load_policy, open_bank
from .processes import Processes
from .recipe import Recipe
from .run import StepError, TrainingRun
from .run_state import restore_state, save_state
from .samples import SampleDrawer, Samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One sign of life: `step` of `num_steps` of a stage is done; metrics come with the "train" stage."""

    stage: str  # "images" | "prompts" | "train"
    step: int
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """The trained expert, its file, the metrics of each step; `stopped` when `should_stop` ended it early."""

    expert: Expert
    path: Path
    records: list[dict[str, float]]
    stopped: bool

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]


class TrainingStoppedError(SafetyExpertsError):
    """`should_stop` ended the run before its first step, so there is no expert to save."""


def resume_path(out_path: str | Path) -> Path:
    """Return where the resumable state of an expert's training lies: beside it, `<name>.resume`."""
    return Path(out_path).with_suffix(".resume")


@memory_errors_explained()
def train_expert(
    checkpoint_path: str | Path,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: str | Path,
    *,
    category: str | None = None,
    device: torch.device | str | None = None,
    tokenizer_folder: str | Path | None = None,
    with_experts: Sequence[Expert] = (),
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    metrics: Sequence[MetricsSink] = (),
    sample_every: int = 0,
    on_samples: Callable[[Samples], None] | None = None,
) -> TrainResult:
    """Train one expert and save it to `out_path` (kohya keys; see experts/expert_file.py).

    Every `save_steps` steps and when stopped, the state goes to `resume_path(out_path)`; it is removed at the end.

    Args:
        checkpoint_path: single-file checkpoint or diffusers folder; need not be the one that drew the dataset.
        category: train on the pairs of this category only; None takes all pairs.
        device: default is accelerate's choice, and its processes share the work; a device given means one process.
        tokenizer_folder: where CLIP's tokenizer lies, when it is not found by itself.
        with_experts: part of the model, frozen, in training and as its reference; the result is without them. By
            default nothing is attached, so that a style LoRA is trained apart from the experts it will be stacked on.
        resume: go on from `resume_path(out_path)`: the result is that of an uninterrupted run.
        on_step: called after every encoded group and every optimizer step; like `metrics` and `on_samples` in the main
            process only.
        should_stop: asked before every forward pass; True saves what there is and ends the run.
        metrics: where the metrics of every step go, also those of the steps before a resumption.
        sample_every: draw a pair's two prompts before the first step and every so many steps; 0: never.
        on_samples: takes the drawn pictures.

    Raises:
        InputError: dataset, checkpoint, recipe or resume state are unusable; the message names the file or field.
        SafetyExpertsError: the loss is not finite, memory or disk are full; the message says what was kept.
        TrainingStoppedError: stopped before the first step.

    Source: Diffusion-DPO (arXiv 2311.12908) with AlignGuard's recipe (arXiv 2412.10493); see methods §1.
    """
    stop_asked = should_stop or (lambda: False)
    processes, target_device = Processes.from_launcher() if device is None else (Processes(), torch.device(device))
    processes.check(recipe)
    notify = on_step if on_step and processes.is_main else (lambda record: None)
    pairs = dataset.training_pairs(category)
    checkpoint = load_checkpoint(checkpoint_path, tokenizer_folder=tokenizer_folder)
    dtype = compute_dtype(recipe, target_device)

    def encoded(stage: str, done: int, total: int) -> None:
        notify(StepRecord(stage, done, total))
        if stop_asked():
            raise TrainingStoppedError("stopped while encoding the dataset; the next run goes on from there")

    with processes.main_first():
        cache = encode_dataset(dataset, pairs, checkpoint, recipe, target_device, dtype, encoded)
    info = _describe(checkpoint, dataset, pairs, recipe, category, with_experts)
    model, denoiser = load_policy(checkpoint, recipe, with_experts, target_device, dtype)
    trained_on, set_aside = split_pairs(pairs, recipe)
    held_out = HeldOut(set_aside, cache, recipe, target_device) if set_aside else None
    plan = BatchPlan(trained_on, cache, recipe)
    bank = open_bank(cache, recipe, with_experts, dtype, processes)
    run = TrainingRun(model, denoiser, plan, recipe, target_device, processes, held_out, bank)
    state_path = resume_path(out_path)
    identity = _identity(info)
    if resume:
        restore_state(run, state_path, identity)
    drawer = None
    if processes.is_main:
        remove_leftovers(state_path)
        remove_leftovers(out_path)
        for sink in metrics:
            sink.start(run.records)
        if sample_every and on_samples:
            drawer = SampleDrawer(checkpoint, cache, (set_aside or trained_on)[0], target_device)
            if not run.step:
                on_samples(drawer.draw(run, 0))

    stopped = False
    try:
        while run.step < recipe.steps and not stopped and not run.stop_reason:
            step_metrics = run.take_step(stop_asked)
            stopped = step_metrics is None
            if step_metrics is not None and processes.is_main:
                for sink in metrics:
                    sink.add(run.step, step_metrics)
                if drawer and on_samples and (run.step % sample_every == 0 or run.step == recipe.steps):
                    on_samples(drawer.draw(run, run.step))
                notify(StepRecord("train", run.step, recipe.steps, step_metrics))
            is_due = stopped or run.step % recipe.save_steps == 0
            if processes.is_main and is_due and 0 < run.step < recipe.steps:
                save_state(run, state_path, identity)
    except StepError as error:
        kept = _rescue(run, state_path, identity, info, Path(out_path))
        raise SafetyExpertsError(f"{error}; {kept}") from error
    finally:
        for sink in metrics:
            sink.close()
    if bank:
        bank.flush()
    if not run.step:
        raise TrainingStoppedError("stopped before the first training step; nothing was saved")

    if run.stop_reason:
        logger.info("training ended at step %d of %d: %s", run.step, recipe.steps, run.stop_reason)
    expert = _expert_of(run, run.finish(), info, Path(out_path), is_finished=not stopped)
    if processes.is_main:
        save_expert(expert, out_path)
        if not stopped:
            state_path.unlink(missing_ok=True)
    return TrainResult(expert, Path(out_path), run.records, stopped)


def _expert_of(run: TrainingRun, step: int, info: ExpertInfo, path: Path, *, is_finished: bool) -> Expert:
    """Return what the UNet carries as an expert of `step`."""
    metrics = {name: round(value, 6) for name, value in run.records[max(step, 1) - 1].items() if math.isfinite(value)}
    assert info.trained
    changes = {"step": step, "metrics": metrics, "resumed_with": tuple(run.changes), "finished": is_finished}
    info = info.model_copy(update={"origin": info.trained.model_copy(update=changes)})
    return Expert(read_layers(run.model, run.recipe.lora_alpha), info, path.stem)


def _rescue(run: TrainingRun, state_path: Path, identity: dict, info: ExpertInfo, out_path: Path) -> str:
    """Save what there is after a step that failed, and return what that is in words."""
    if not run.step:
        return "nothing was trained yet"
    save_state(run, state_path, identity)
    kept = f"the state of step {run.step} is kept in {state_path.name}, from which resume goes on"
    if step := run.rescue():
        save_expert(_expert_of(run, step, info, out_path, is_finished=False), out_path)
        kept += f", and the expert of step {step} was saved as {out_path.name}"
    return kept


def _describe(checkpoint: Checkpoint, dataset, pairs, recipe, category, with_experts) -> ExpertInfo:
    trained = Trained(
        recipe=recipe.model_dump(mode="json"),
        dataset_fingerprint=dataset.fingerprint(),
        num_pairs=len(pairs),
        seed=recipe.seed,
        trained_with=tuple(expert.as_parent() for expert in with_experts),
    )
    categories = [category] if category else sorted({name for pair in pairs for name in pair.categories})
    base = CheckpointId(name=checkpoint.name, sha256=checkpoint.sha256, family=checkpoint.family)
    return ExpertInfo(categories=tuple(categories), base_checkpoint=base, origin=trained)


def _identity(info: ExpertInfo) -> dict:
    """Return what a resumed run must agree with, as JSON values."""
    trained = info.trained
    assert trained
    return {
        "recipe": trained.recipe,
        "dataset_fingerprint": trained.dataset_fingerprint,
        "base_checkpoint": info.base_checkpoint.model_dump(),
        "categories": list(info.categories),
        "trained_with": [parent.model_dump(mode="json", exclude_none=True) for parent in trained.trained_with] or None,
    }
