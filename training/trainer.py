"""Train one expert: a LoRA on a checkpoint's UNet, from a preference dataset, by a recipe.

The reference of the preference objective is the same UNet with the LoRA off; images and prompts are encoded once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, SafetyExpertsError
from ..experts.expert import Expert
from ..experts.expert_file import save_expert
from ..preferences.dataset import PreferenceDataset
from .batches import Batch, BatchPlan
from .cache import PairCache
from .checkpoint import Checkpoint, load_checkpoint
from .denoiser import Denoiser, UNetDenoiser
from .lora import adapter_off, attach_lora, lora_parameters, read_layers
from .objectives import (
    OBJECTIVES,
    ObjectiveOptions,
    PairPredictions,
    anchor_loss,
    preference_metrics,
    preserve_winner,
)
from .recipe import Recipe

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
    """The trained expert, its file, and one metrics record a step; `stopped` when `should_stop` ended it early."""

    expert: Expert
    path: Path
    records: list[StepRecord]
    stopped: bool

    @property
    def losses(self) -> list[float]:
        return [record.metrics["loss"] for record in self.records]


class TrainingStoppedError(SafetyExpertsError):
    """`should_stop` ended the run before its first step, so there is nothing to save."""


def choose_device() -> torch.device:
    """Return the device accelerate would train on: CUDA, XPU, MPS, … or the CPU."""
    from accelerate import PartialState

    return PartialState().device


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return what the UNet computes in: the recipe's precision, or bfloat16 where the device is fast at it."""
    if recipe.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated on a CPU and slower than float32.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
        return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32
    return torch.float32


def train_expert(
    checkpoint_path: str | Path,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: str | Path,
    *,
    category: str | None = None,
    device: torch.device | str | None = None,
    tokenizer_folder: str | Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train one expert and save it to `out_path` (kohya keys; see experts/expert_file.py).

    Args:
        checkpoint_path: single-file checkpoint or diffusers folder; need not be the one that drew the dataset.
        category: train on the pairs of this category only; None takes all pairs.
        device: default is accelerate's choice.
        tokenizer_folder: where CLIP's tokenizer lies, when it is not found by itself.
        on_step: called after every encoded group and every optimizer step.
        should_stop: asked before every forward pass; True saves what there is and ends the run.

    Raises:
        InputError: dataset, checkpoint or recipe are unusable; the message names the file or field.
        SafetyExpertsError: the loss is not finite, or the file could not be written; nothing is left behind.
        TrainingStoppedError: stopped before the first step.

    Source: Diffusion-DPO (arXiv 2311.12908) with AlignGuard's recipe (arXiv 2412.10493); see methods §1.
    """
    notify = on_step or (lambda record: None)
    stop_asked = should_stop or (lambda: False)
    target_device = torch.device(device) if device is not None else choose_device()
    pairs = dataset.training_pairs(category)
    checkpoint = load_checkpoint(checkpoint_path, tokenizer_folder=tokenizer_folder)
    dtype = compute_dtype(recipe, target_device)

    def encoding(stage: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            notify(StepRecord(stage, done, total))
            if stop_asked():
                raise TrainingStoppedError("stopped while encoding the dataset; the next run goes on from there")

        return progress

    with torch.no_grad():
        # A CPU encodes in float32: its bfloat16 convolutions are no faster at this size and cost accuracy.
        encode_dtype = torch.float32 if target_device.type == "cpu" else dtype
        cache = PairCache(dataset, checkpoint, target_device, encode_dtype)
        cache.encode_pairs(pairs, flips=recipe.horizontal_flip, on_progress=encoding("images"))
        prompts = ["", *(pair.prompt for pair in pairs), *(pair.safe_prompt for pair in pairs)]
        cache.encode_prompts(prompts, on_progress=encoding("prompts"))

    # A CPU keeps float32 weights and lets autocast convert them; elsewhere they would only take memory.
    unet = checkpoint.load_unet(dtype=torch.float32 if target_device.type == "cpu" else dtype, device=target_device)
    attach_lora(unet, recipe)
    if recipe.gradient_checkpointing:
        unet.train()  # diffusers checkpoints in training mode only; these UNets have no dropout
        unet.enable_gradient_checkpointing()
    denoiser = UNetDenoiser(
        unet, checkpoint.alphas_cumprod, checkpoint.prediction_type, dtype if dtype != torch.float32 else None
    )
    records, stopped = _run_steps(
        unet, denoiser, BatchPlan(pairs, cache, recipe), recipe, target_device, notify, stop_asked
    )
    if not records:
        raise TrainingStoppedError("stopped before the first training step; nothing was saved")
    expert = Expert(
        layers=read_layers(unet, recipe.lora_alpha),
        info=_describe(checkpoint, dataset, pairs, recipe, category, records),
        name=Path(out_path).stem,
    )
    save_expert(expert, out_path)
    return TrainResult(expert, Path(out_path), records, stopped)


def _run_steps(unet, denoiser, plan, recipe, device, notify, stop_asked) -> tuple[list[StepRecord], bool]:
    from diffusers.optimization import get_scheduler

    parameters = list(lora_parameters(unet).values())
    if not parameters:
        raise InputError(f"no {recipe.targets} layers found in the UNet; is this a diffusion model with attention?")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scheduler = get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, recipe.steps)
    records: list[StepRecord] = []
    for step in range(recipe.steps):
        totals: dict[str, float] = {}
        for micro in range(recipe.accumulation_steps):
            if stop_asked():
                return records, True
            batch = plan.batch(step * recipe.accumulation_steps + micro)
            loss, metrics = batch_loss(unet, denoiser, plan.cache, batch, recipe, device)
            if not bool(torch.isfinite(loss)):
                raise SafetyExpertsError(
                    f"the loss became {float(loss)} at step {step + 1} of {recipe.steps}; "
                    "lower learning_rate or beta, or set precision to fp32; nothing was saved"
                )
            (loss / recipe.accumulation_steps).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / recipe.accumulation_steps
        totals["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
        totals["learning_rate"] = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        records.append(StepRecord("train", step + 1, recipe.steps, totals))
        notify(records[-1])
    return records, False


def batch_loss(
    unet: torch.nn.Module, denoiser: Denoiser, cache: PairCache, batch: Batch, recipe: Recipe, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [], metrics) of one forward pass: the objectives, plus anchor and SFT terms where the recipe asks.

    Policy and reference each see chosen, rejected and anchor samples in one batch, [2b or 3b, c, h, w].
    """
    size = len(batch.chosen)
    latents, noise = [batch.chosen, batch.rejected], [batch.noise, batch.noise]
    timesteps, prompts = [batch.timesteps, batch.rejected_timesteps], [*batch.prompts, *batch.prompts]
    if recipe.anchor_weight:
        is_noise = recipe.anchor_samples == "noise"
        latents.append(batch.chosen)
        noise.append(batch.anchor_noise)
        timesteps.append(torch.full_like(batch.timesteps, 999) if is_noise else batch.anchor_timesteps)
        prompts += [""] * size if is_noise else batch.anchor_prompts
    x, eps, t = (torch.cat(parts).to(device) for parts in (latents, noise, timesteps))
    conditions = {name: value.to(device, torch.float32) for name, value in cache.conditions(prompts).items()}
    noisy, target = denoiser.add_noise(x, eps, t), denoiser.target(x, eps, t)
    if recipe.anchor_weight and recipe.anchor_samples == "noise":
        noisy[2 * size :] = eps[2 * size :]  # the schedule's last step still holds a little signal
    with torch.no_grad(), adapter_off(unet):
        reference = denoiser.predict(noisy, t, conditions)
    policy = denoiser.predict(noisy, t, conditions)

    predictions = PairPredictions(
        *policy[: 2 * size].split(size),
        *reference[: 2 * size].split(size),
        *target[: 2 * size].split(size),
        chosen_unsafe=batch.chosen_unsafe.to(device),
        rejected_unsafe=batch.rejected_unsafe.to(device),
    )
    if recipe.winner_preserving is not None:
        predictions = preserve_winner(predictions, recipe.winner_preserving)
    options = ObjectiveOptions(**{item.name: getattr(recipe, item.name) for item in fields(ObjectiveOptions)})
    errors = predictions.errors()
    loss = sum(
        (weight * OBJECTIVES[name](predictions, options).mean() for name, weight in recipe.objective.items()),
        start=torch.zeros((), device=device),
    )
    metrics = {"loss/preference": float(loss.detach()), **preference_metrics(errors, beta=recipe.beta)}
    if recipe.sft_weight:
        loss = loss + recipe.sft_weight * errors.policy_chosen.mean()
    if recipe.anchor_weight:
        anchor = anchor_loss(policy[2 * size :], reference[2 * size :])
        metrics["loss/anchor"] = float(anchor.detach())
        loss = loss + recipe.anchor_weight * anchor
    return loss, {"loss": float(loss.detach()), **metrics}


def _describe(checkpoint: Checkpoint, dataset, pairs, recipe, category, records) -> dict:
    categories = [category] if category else sorted({name for pair in pairs for name in pair.categories})
    return {
        "categories": categories,
        "recipe": recipe.model_dump(),
        "objective": recipe.objective,
        "dataset_fingerprint": dataset.fingerprint(),
        "num_pairs": len(pairs),
        "base_checkpoint": {"name": checkpoint.name, "sha256": checkpoint.sha256, "family": checkpoint.family},
        "step": records[-1].step,
        "seed": recipe.seed,
        "metrics": {name: round(value, 6) for name, value in records[-1].metrics.items()},
    }
