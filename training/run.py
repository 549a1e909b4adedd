"""The moving part of a training run: LoRA weights, optimizer, averaged weights, step; saved and restored exactly.

Batches and learning rate are functions of the step alone (batches.py, `learning_rate_at`), so this is all the state.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError, SafetyExpertsError
from ..files import write_atomically
from .batches import BatchPlan
from .denoiser import Denoiser
from .held_out import HeldOut
from .lora import lora_parameters
from .processes import Processes
from .recipe import Recipe
from .step_loss import batch_loss


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0): linear warm-up, then the recipe's schedule."""
    if recipe.schedule != "constant" and step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    warmup = 0 if recipe.schedule == "constant" else recipe.warmup_steps
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    factor = {
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[recipe.schedule]
    return recipe.learning_rate * factor


class TrainingRun:
    """Takes optimizer steps on a UNet that carries a LoRA (see lora.attach_lora).

    Attributes:
        step: optimizer steps taken.
        records: metrics of each step, one dict a step.
    """

    def __init__(
        self,
        unet: nn.Module,
        denoiser: Denoiser,
        plan: BatchPlan,
        recipe: Recipe,
        device: torch.device,
        processes: Processes | None = None,
        held_out: HeldOut | None = None,
    ):
        self.unet, self.denoiser, self.plan, self.recipe, self.device = unet, denoiser, plan, recipe, device
        self.processes = processes or Processes()
        self.processes.check(recipe)
        self.held_out = held_out
        self.parameters = lora_parameters(unet)
        if not self.parameters:
            raise InputError(f"the UNet has no {recipe.targets} layers to train; is this a diffusion model?")
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}
        self.best_step = 0
        self.records: list[dict[str, float]] = []

    @property
    def step(self) -> int:
        return len(self.records)

    def take_step(self, should_stop) -> dict[str, float] | None:
        """Accumulate, clip and update once; return the metrics, or None when `should_stop` said so (nothing changed).

        Raises:
            SafetyExpertsError: the loss is not finite; the weights are those of the step before.
        """
        recipe = self.recipe
        totals: dict[str, float] = {}
        for micro in range(recipe.accumulation_steps):
            if should_stop():
                self.optimizer.zero_grad(set_to_none=True)
                return None
            batch = self.processes.share(self.plan.batch(self.step * recipe.accumulation_steps + micro))
            loss, metrics = batch_loss(self.unet, self.denoiser, self.plan.cache, batch, recipe, self.device)
            metrics = self.processes.mean(metrics, self.device)
            if not math.isfinite(metrics["loss"]):
                raise SafetyExpertsError(
                    f"the loss became {metrics['loss']} at step {self.step + 1} of {recipe.steps}; "
                    "lower learning_rate or beta, or set precision to fp32; no expert was written"
                )
            (loss / recipe.accumulation_steps).backward()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / recipe.accumulation_steps
        self.processes.average_gradients(self.parameters.values())
        rate = learning_rate_at(recipe, self.step)
        totals["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters.values(), recipe.max_grad_norm))
        totals["learning_rate"] = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - recipe.ema_decay)
        self.records.append(totals)
        if self.held_out and (self.step % recipe.evaluate_steps == 0 or self.step == recipe.steps):
            totals |= self._measure(self.held_out)
        return totals

    def _measure(self, held_out: HeldOut) -> dict[str, float]:
        trained = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._set_weights(self.average)
        measured = held_out.measure(self.unet, self.denoiser)
        self._set_weights(trained)
        limit = self.recipe.max_drift or math.inf
        if measured["eval/loss"] < self._best_loss and measured["eval/drift"] <= limit:
            self.best_step = self.step
            self.best = {name: value.clone() for name, value in self.average.items()}
        return measured

    @property
    def _best_loss(self) -> float:
        # Before the first measurement the expert is the identity, with loss ln 2.
        return self.records[self.best_step - 1]["eval/loss"] if self.best_step else math.log(2)

    @property
    def stop_reason(self) -> str | None:
        """Why there is no point in going on, or None."""
        measured = [record for record in self.records if "eval/loss" in record]
        if measured and measured[-1]["eval/drift"] > (self.recipe.max_drift or math.inf):
            return f"drift {measured[-1]['eval/drift']:.2g} passed max_drift"
        since_best = sum("eval/loss" in record for record in self.records[self.best_step :])
        if self.recipe.patience and since_best >= self.recipe.patience:
            return f"no better held-out loss in {since_best} measurements"
        return None

    def finish(self) -> int:
        """Put what the expert is made of into the UNet and return the step it is from.

        With patience or max_drift those are the best weights, else the averaged ones (the last, at ema_decay 0).
        """
        keeps_best = self.held_out and (self.recipe.patience or self.recipe.max_drift)
        self._set_weights(self.best if keeps_best else self.average)
        return self.best_step if keeps_best else self.step

    def _set_weights(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def save(self, path: Path, identity: dict) -> None:
        """Write the whole state as one safetensors file; `identity` says what run it belongs to.

        Raises:
            SafetyExpertsError: the disk is full or the folder cannot be written to.
        """
        tensors = {f"weight.{name}": value.detach() for name, value in self.parameters.items()}
        tensors.update({f"average.{name}": value for name, value in self.average.items()})
        tensors.update({f"best.{name}": value for name, value in self.best.items()})
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{kind}.{name}"] = torch.as_tensor(value)
        progress = {"records": self.records, "best_step": self.best_step}
        metadata = {"identity": json.dumps(identity, sort_keys=True), "progress": json.dumps(progress)}
        with write_atomically(path) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary, metadata)

    def restore(self, path: Path, identity: dict) -> None:
        """Go on from a file of `save`.

        Raises:
            InputError: the file is missing, damaged, or belongs to another recipe, dataset or checkpoint.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot resume from {path}: {error}; train again without resuming") from error
        saved = json.loads(metadata["identity"])
        for key, value in json.loads(json.dumps(identity)).items():
            if saved.get(key) != value:
                raise InputError(
                    f"cannot resume from {path}: its {key} was {saved.get(key)!r}, now it is {value!r}; "
                    "use the same or train again without resuming"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.best[name].copy_(tensors[f"best.{name}"])
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "optimizer":
                kind, _, name = rest.partition(".")
                parameter = self.parameters[name]
                # torch keeps the step counter on the CPU and the moments beside the weights.
                self.optimizer.state[parameter][kind] = value if kind == "step" else value.to(parameter.device)
        progress = json.loads(metadata["progress"])
        self.records, self.best_step = progress["records"], progress["best_step"]
