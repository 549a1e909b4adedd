"""Train one expert: a LoRA on a checkpoint's UNet, from a preference dataset, by a recipe.

The reference of the preference objective is the same UNet with the LoRA off; images and prompts are encoded once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import save_expert
from ..preferences.dataset import PreferenceDataset
from .batches import BatchPlan
from .cache import PairCache
from .checkpoint import Checkpoint, load_checkpoint
from .denoiser import UNetDenoiser
from .held_out import HeldOut, split_pairs
from .lora import add_frozen, attach_lora, read_layers
from .processes import Processes
from .recipe import Recipe
from .run import TrainingRun

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


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return what the UNet computes in: the recipe's precision, or bfloat16 where the device is fast at it."""
    if recipe.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated on a CPU and slower than float32.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
        return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32
    return torch.float32


def resume_path(out_path: str | Path) -> Path:
    """Return where the resumable state of an expert's training lies: beside it, `<name>.resume`."""
    return Path(out_path).with_suffix(".resume")


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
        on_step: called after every encoded group and every optimizer step.
        should_stop: asked before every forward pass; True saves what there is and ends the run.

    Raises:
        InputError: dataset, checkpoint, recipe or resume state are unusable; the message names the file or field.
        SafetyExpertsError: the loss is not finite, or the file could not be written; nothing half-written stays.
        TrainingStoppedError: stopped before the first step.

    Source: Diffusion-DPO (arXiv 2311.12908) with AlignGuard's recipe (arXiv 2412.10493); see methods §1.
    """
    notify = on_step or (lambda record: None)
    stop_asked = should_stop or (lambda: False)
    processes, target_device = Processes.from_launcher() if device is None else (Processes(), torch.device(device))
    processes.check(recipe)
    pairs = dataset.training_pairs(category)
    checkpoint = load_checkpoint(checkpoint_path, tokenizer_folder=tokenizer_folder)
    dtype = compute_dtype(recipe, target_device)
    with processes.main_first():
        cache = _encode(dataset, pairs, checkpoint, recipe, target_device, dtype, notify, stop_asked)
    info = _describe(checkpoint, dataset, pairs, recipe, category)
    if with_experts:
        info["trained_with"] = [expert.origin() for expert in with_experts]

    # A CPU keeps float32 weights and lets autocast convert them; elsewhere they would only take memory.
    unet: Any = checkpoint.load_unet(
        dtype=torch.float32 if target_device.type == "cpu" else dtype, device=target_device
    )
    for expert in with_experts:
        add_frozen(unet, expert)
    attach_lora(unet, recipe)
    if recipe.gradient_checkpointing:
        unet.train()  # diffusers checkpoints in training mode only; these UNets have no dropout
        unet.enable_gradient_checkpointing()
    denoiser = UNetDenoiser(
        unet, checkpoint.alphas_cumprod, checkpoint.prediction_type, dtype if dtype != torch.float32 else None
    )
    trained_on, set_aside = split_pairs(pairs, recipe)
    held_out = HeldOut(set_aside, cache, recipe, target_device) if set_aside else None
    plan = BatchPlan(trained_on, cache, recipe)
    run = TrainingRun(unet, denoiser, plan, recipe, target_device, processes, held_out)
    state_path = resume_path(out_path)
    identity = {key: info[key] for key in ("recipe", "dataset_fingerprint", "base_checkpoint", "categories")}
    identity["trained_with"] = info.get("trained_with")
    if resume:
        run.restore(state_path, identity)

    stopped = False
    while run.step < recipe.steps and not stopped and not run.stop_reason:
        metrics = run.take_step(stop_asked)
        stopped = metrics is None
        if metrics is not None:
            notify(StepRecord("train", run.step, recipe.steps, metrics))
        if (
            processes.is_main
            and run.step
            and (stopped or run.step % recipe.save_steps == 0)
            and run.step < recipe.steps
        ):
            run.save(state_path, identity)
    if not run.step:
        raise TrainingStoppedError("stopped before the first training step; nothing was saved")

    if run.stop_reason:
        logger.info("training ended at step %d of %d: %s", run.step, recipe.steps, run.stop_reason)
    step = run.finish()
    info |= {"step": step, "metrics": {name: round(value, 6) for name, value in run.records[max(step, 1) - 1].items()}}
    expert = Expert(layers=read_layers(unet, recipe.lora_alpha), info=info, name=Path(out_path).stem)
    if processes.is_main:
        save_expert(expert, out_path)
        if not stopped:
            state_path.unlink(missing_ok=True)
    return TrainResult(expert, Path(out_path), run.records, stopped)


@torch.no_grad()
def _encode(dataset, pairs, checkpoint, recipe, device, dtype, notify, stop_asked) -> PairCache:
    def progress_of(stage: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            notify(StepRecord(stage, done, total))
            if stop_asked():
                raise TrainingStoppedError("stopped while encoding the dataset; the next run goes on from there")

        return progress

    # A CPU encodes in float32: encoding is done once, and bfloat16 would cost accuracy for little time.
    cache = PairCache(dataset, checkpoint, device, torch.float32 if device.type == "cpu" else dtype)
    cache.encode_pairs(pairs, flips=recipe.horizontal_flip, on_progress=progress_of("images"))
    prompts = ["", *(pair.prompt for pair in pairs), *(pair.safe_prompt for pair in pairs)]
    cache.encode_prompts(prompts, on_progress=progress_of("prompts"))
    return cache


def _describe(checkpoint: Checkpoint, dataset, pairs, recipe, category) -> dict:
    return {
        "categories": [category] if category else sorted({name for pair in pairs for name in pair.categories}),
        "recipe": recipe.model_dump(),
        "dataset_fingerprint": dataset.fingerprint(),
        "num_pairs": len(pairs),
        "base_checkpoint": {"name": checkpoint.name, "sha256": checkpoint.sha256, "family": checkpoint.family},
        "seed": recipe.seed,
    }
