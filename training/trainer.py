"""Train one expert: a LoRA on a checkpoint's denoiser, from a preference dataset, by a recipe.

Reads from top to bottom: prepare, loop, finish. The reference of the preference objective is the same model with the
LoRA off; images and prompts are encoded once.
"""

import contextlib
import logging
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..devices import compute_dtype
from ..errors import InputError, SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import save_expert
from ..experts.info import ExpertInfo
from ..files import only_writer, remove_leftovers
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset
from .batches import BatchPlan
from .cautions import cautions
from .events import SAMPLE, SAVE, StepRecord, TrainingEvents
from .held_out import HeldOut, split_pairs
from .identity import describe_training, identity_of
from .memory import memory_errors_explained
from .policy import PolicyLoader
from .preparation import encode_dataset, load_policy, open_bank
from .processes import Processes
from .recipe import Recipe
from .retained import RetainedPrompts, retained_prompts
from .run import StepError, TrainingRun
from .run_state import restore_state, save_state
from .samples import SampleDrawer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training.

    Args:
        expert: with its metadata.
        path: its file.
        records: the metrics of each step taken.
        step: the one that the expert's weights are from.
        stopped: `should_stop` ended it early.
    """

    expert: Expert
    path: Path
    records: list[dict[str, float]]
    step: int
    stopped: bool

    @property
    def shortfall(self) -> str | None:
        """What the expert falls short of, in words; None where its recipe sets no target, or it is reached."""
        return self.expert.info.trained.shortfall if self.expert.info.trained else None

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]


class TrainingStoppedError(SafetyExpertsError):
    """`should_stop` ended the run before there was an expert to save."""


def resume_path(out_path: str | Path) -> Path:
    """Return where the resumable state of an expert's training lies: beside it, `<name>.resume`."""
    return Path(out_path).with_suffix(".resume")


@memory_errors_explained()
def train_expert(
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: str | Path,
    *,
    events: TrainingEvents | None = None,
    category: str | None = None,
    device: torch.device | str | None = None,
    with_experts: Sequence[Expert] = (),
    resume: bool = False,
    policy_loader: PolicyLoader | None = None,
    retain: RetainedPrompts | None = None,
) -> TrainResult:
    """Train one expert and save it to `out_path` (kohya keys; see experts/expert_file.py).

    Every `save_steps` steps and when stopped, the state goes to `resume_path(out_path)`; it is removed at the end.

    Args:
        checkpoint: need not be the one that drew the dataset.
        category: train on the pairs of this category only; None takes all pairs.
        device: default is accelerate's choice, and its processes share the work; a device given means one process.
        with_experts: part of the model, frozen, in training and as its reference; the result is without them. By
            default nothing is attached, so that a style LoRA is trained apart from the experts it will be stacked on.
        resume: go on from `resume_path(out_path)`: the result is that of an uninterrupted run.
        policy_loader: makes the model in training of a checkpoint; default is a LoRA on diffusers' model.
        retain: prompts that must stay as they are, by group, beside those of the dataset's other categories.

    Raises:
        InputError: dataset, checkpoint, recipe or resume state are unusable, or another process trains `out_path`; the
            message names the file or field.
        SafetyExpertsError: the loss is not finite, memory or disk are full, or no measurement was better than the
            untrained model; the message says what was kept.
        TrainingStoppedError: stopped before there was an expert.

    Source: Diffusion-DPO (arXiv 2311.12908) with AlignGuard's recipe (arXiv 2412.10493); see methods §1.
    """
    events = events or TrainingEvents()
    # Of several processes the first writes.
    with only_writer(out_path) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        training = _prepare(
            checkpoint, dataset, recipe, Path(out_path), events, category, device, with_experts, policy_loader, retain
        )
        try:
            if resume:
                _restore(training)
            _start(training, events)
            stopped = _loop(training, events)
            return _finish(training, stopped)
        except StepError as error:
            raise SafetyExpertsError(f"{error}; {_rescue(training)}") from error
        finally:
            for sink in events.sinks:
                sink.close()
            training.run.policy.close()


@dataclass(frozen=True)
class _Training:
    """A prepared training: the moving part, and what it is of."""

    run: TrainingRun
    info: ExpertInfo
    out_path: Path
    drawer: SampleDrawer

    @property
    def state_path(self) -> Path:
        return resume_path(self.out_path)


# --- prepare ---


def _prepare(
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: Path,
    events: TrainingEvents,
    category: str | None,
    device: torch.device | str | None,
    with_experts: Sequence[Expert],
    policy_loader: PolicyLoader | None,
    retain: RetainedPrompts | None,
) -> _Training:
    processes, target = Processes.from_launcher() if device is None else (Processes(), torch.device(device))
    processes.check(recipe)
    pairs = dataset.training_pairs(category, recipe.pairs)
    retained = retained_prompts(dataset, pairs, category, recipe, retain or {})
    dtype = compute_dtype(target, recipe.precision)

    def encoded(stage: str, done: int, total: int) -> None:
        if processes.is_main:
            events.on_step(StepRecord(stage, done, total))
        if events.should_stop():
            raise TrainingStoppedError("stopped while encoding the dataset; the next run goes on from there")

    with processes.main_first():
        cache = encode_dataset(dataset, pairs, checkpoint, recipe, target, dtype, encoded, retained)
    policy = (policy_loader or load_policy)(checkpoint, recipe, with_experts, target, dtype)
    trained_on, set_aside = split_pairs(pairs, recipe)
    with_target = recipe.model_copy(update={"guidance": _guidance(recipe, dataset)})
    for caution in cautions(with_target, with_target.guidance):
        logger.warning("%s", caution)
    held_out = HeldOut(set_aside, cache, with_target, target, retained) if set_aside else None
    bank = open_bank(cache, recipe, with_experts, dtype, processes)
    plan = BatchPlan(trained_on, cache, with_target, retained)
    run = TrainingRun(policy, plan, with_target, target, processes, held_out, bank)
    info = describe_training(checkpoint, dataset, recipe, category, with_experts, retain)
    return _Training(run, info, out_path, SampleDrawer(checkpoint, cache, (set_aside or trained_on)[0], target))


def _guidance(recipe: Recipe, dataset: PreferenceDataset) -> float | None:
    """Return the guidance that the model is drawn with: the recipe's, or what the dataset was drawn with, if known."""
    drawn_with = dataset.info.sampler.get("cfg")
    is_known = isinstance(drawn_with, int | float) and not isinstance(drawn_with, bool)
    return float(drawn_with) if recipe.guidance is None and is_known else recipe.guidance


def _restore(training: _Training) -> None:
    if not training.state_path.exists():
        why = "its training is finished" if training.out_path.exists() else "no training of this name was stopped"
        raise InputError(f"nothing to resume for {training.out_path}: {why}; train without resuming")
    restore_state(training.run, training.state_path, identity_of(training.info))


def _start(training: _Training, events: TrainingEvents) -> None:
    """Hand on the steps before a resumption, and draw what the base model draws."""
    run = training.run
    if not run.processes.is_main:
        return
    remove_leftovers(training.state_path)
    remove_leftovers(training.out_path)
    for sink in events.sinks:
        sink.start(run.records)
    if run.records:
        events.on_resume(run.records)
    elif events.sample_every:
        events.on_samples(training.drawer.draw(run, 0))


# --- loop ---


def _loop(training: _Training, events: TrainingEvents) -> bool:
    """Take the steps; return whether `should_stop` ended them."""
    run, recipe = training.run, training.run.recipe
    stopped = False
    asked: Collection[str] = ()
    while run.step < recipe.steps and not stopped and not run.stop_reason:
        metrics = run.take_step(events.should_stop)
        stopped = metrics is None
        if not run.processes.is_main:
            continue
        if metrics is not None:
            for sink in events.sinks:
                sink.add(run.step, metrics)
            asked = events.take_requests()
            is_due = events.sample_every and (run.step % events.sample_every == 0 or run.step == recipe.steps)
            if is_due or SAMPLE in asked:
                events.on_samples(training.drawer.draw(run, run.step))
            if SAVE in asked:
                events.on_saved(_save_on_the_way(training))
            events.on_step(StepRecord("train", run.step, recipe.steps, metrics))
        if (stopped or SAVE in asked or run.step % recipe.save_steps == 0) and 0 < run.step < recipe.steps:
            save_state(run, training.state_path, identity_of(training.info))
    if run.bank:
        run.bank.flush()
    return stopped


def _save_on_the_way(training: _Training) -> Path:
    """Save the expert as it is, marked as unfinished, beside the one that this training is going to write."""
    run = training.run
    path = training.out_path.with_name(f"{training.out_path.stem}step_{run.step}.safetensors")
    with run.weights(run.average):
        save_expert(replace(_expert_of(training, run.step, finished=False), name=path.stem), path)
    return path


# --- finish ---


def _finish(training: _Training, stopped: bool) -> TrainResult:
    run = training.run
    if not run.step:
        raise TrainingStoppedError("stopped before the first training step; nothing was saved")
    if run.stop_reason:
        logger.info("training ended at step %d of %d: %s", run.step, run.recipe.steps, run.stop_reason)
    step = run.finish()
    if not step:
        raise _no_expert(run, stopped)
    expert = _expert_of(training, step, finished=not stopped)
    if run.shortfall:
        logger.warning("the expert falls short of its target: %s", run.shortfall)
    if run.processes.is_main:
        save_expert(expert, training.out_path)
        if not stopped:
            training.state_path.unlink(missing_ok=True)
    return TrainResult(expert, training.out_path, run.records, step, stopped)


def _no_expert(run: TrainingRun, stopped: bool) -> SafetyExpertsError:
    """Say that no measurement was better than the untrained model."""
    measured = [record["eval/loss"] for record in run.records if "eval/loss" in record]
    if run.shortfall:
        reason = f"no weights of {run.step} steps are within the budget and better than none, so no expert was saved"
        text = f"{reason}: {run.shortfall}"
        return TrainingStoppedError(f"stopped: {text}; resume goes on") if stopped else SafetyExpertsError(text)
    found = (
        f"no held-out measurement in {run.step} steps was better than the untrained model's loss of "
        f"{run.untrained['eval/loss']:.4g} within the limits (least: {min(measured):.4g}), so no expert was saved"
    )
    if stopped:
        return TrainingStoppedError(f"stopped: {found}; resume goes on")
    why = f" ({run.stop_reason})" if run.stop_reason else ""
    return SafetyExpertsError(f"{found}{why}; change learning_rate or beta, or train with patience=0 and no limits")


def _expert_of(training: _Training, step: int, *, finished: bool) -> Expert:
    """Return what the model carries as an expert of `step`."""
    run = training.run
    metrics = {name: round(value, 6) for name, value in run.records[step - 1].items() if math.isfinite(value)}
    if run.untrained:
        metrics["eval/untrained_loss"] = round(run.untrained["eval/loss"], 6)
    assert training.info.trained
    changes = {"step": step, "metrics": metrics, "resumed_with": tuple(run.changes), "finished": finished}
    changes["shortfall"] = run.shortfall
    info = training.info.model_copy(update={"origin": training.info.trained.model_copy(update=changes)})
    return Expert(run.policy.read_layers(), info, training.out_path.stem)


def _rescue(training: _Training) -> str:
    """Save what there is after a step that failed, and return what that is in words."""
    run = training.run
    if not run.step:
        return "nothing was trained yet"
    save_state(run, training.state_path, identity_of(training.info))
    kept = f"the state of step {run.step} is kept in {training.state_path.name}, from which resume goes on"
    if step := run.rescue():
        save_expert(_expert_of(training, step, finished=False), training.out_path)
        kept += f", and the expert of step {step} was saved as {training.out_path.name}"
    return kept
