"""The moving part of a training run: LoRA weights, optimizer, averaged weights, step (saved by run_state.py).

Batches and learning rate are functions of the step alone (batches.py, `learning_rate_at`), so this is all the state.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, SafetyExpertsError
from .batches import BatchPlan
from .beta import beta_at
from .held_out import HeldOut
from .memory import REMEDY, is_out_of_memory
from .policy import Policy
from .processes import Processes
from .recipe import Recipe
from .redirect import LEAK_WEIGHT, Balance, check_separation, leak_weight_at, retained_shares
from .reference_bank import ReferenceBank
from .step_loss import batch_loss
from .stop_rules import is_kept, keeps_best, learning_rate_factor, shortfall, stop_reason, watched

_FIRST_LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's


class StepError(SafetyExpertsError):
    """A step could not be taken; the run is as it was after the step before."""


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
    """Takes optimizer steps on a policy's parameters.

    Attributes:
        step: optimizer steps taken.
        records: metrics of each step, one dict a step.
        average: what an expert of this step is made of, by parameter name; the weights themselves at ema_decay 0.
        changes: steps at which the run was resumed with other options.
        untrained: what the held-out pairs measure without the LoRA; empty before the first step or without such pairs.
    """

    def __init__(
        self,
        policy: Policy,
        plan: BatchPlan,
        recipe: Recipe,
        device: torch.device,
        processes: Processes | None = None,
        held_out: HeldOut | None = None,
        bank: ReferenceBank | None = None,
    ):
        self.policy, self.plan, self.recipe, self.device = policy, plan, recipe, device
        self.processes = processes or Processes()
        self.processes.check(recipe)
        self.held_out = held_out
        self.bank = bank
        self.parameters = policy.parameters
        if recipe.redirect and not held_out:
            raise InputError("redirect measures itself on held-out pairs: give two pairs at least")
        if not self.parameters:
            raise InputError(f"the model has no {recipe.targets} layers to train; is this a diffusion model?")
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.best = {name: value.clone() for name, value in self.average.items()}
        self.best_step = 0
        self.records: list[dict[str, float]] = []
        self.changes: list[dict] = []
        self.untrained: dict[str, float] = {}

    @property
    def step(self) -> int:
        return len(self.records)

    def take_step(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Accumulate, clip and update once; return the metrics, or None when `should_stop` said so (nothing changed).

        Raises:
            StepError: the loss or a gradient is not finite, or memory ran out; weights are those of the step before.
        """
        try:
            self._measure_untrained()
            totals = self._gradients(should_stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise StepError(f"out of memory {self._where}; {REMEDY}") from error
        if totals is None:
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = totals["learning_rate"]
        self.optimizer.step()
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - self.recipe.ema_decay)
        self.records.append(totals)
        if self.held_out and (self.step % self.recipe.evaluate_steps == 0 or self.step == self.recipe.steps):
            totals |= self._measure(self.held_out)
        return totals

    @property
    def _where(self) -> str:
        return f"at step {self.step + 1} of {self.recipe.steps}"

    def _gradients(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Leave the clipped gradients of the next step in the parameters and return its metrics.

        In float16 the loss is scaled up, so that small gradients do not vanish. Where that overflows, the scale is
        halved and the same step computed again: no step is lost, and the scale is part of the step's metrics.
        """
        is_half = self.policy.denoiser.autocast_dtype is torch.float16
        last = self.records[-1] if self.records else {}
        scale = last.get("loss_scale", _FIRST_LOSS_SCALE) if is_half else 1.0
        totals = self._scaled_gradients(scale, should_stop)
        while totals and scale > 1 and not math.isfinite(totals["grad_norm"]):
            scale /= 2
            totals = self._scaled_gradients(scale, should_stop)
        if totals is None:
            return None
        self._check_finite("gradient", totals["grad_norm"])
        if is_half:
            totals["loss_scale"] = scale
        factor = learning_rate_factor(self.recipe, self.records)
        totals["learning_rate"] = factor * learning_rate_at(self.recipe, self.step)
        return totals

    def _scaled_gradients(self, scale: float, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        recipe, totals, counts = self.recipe, dict[str, float](), dict[str, int]()
        if recipe.target_gradient_factor is not None:
            recipe = recipe.model_copy(update={"beta": beta_at(recipe, self.records)})
            totals["beta"] = recipe.beta
        balance = self._balance()
        if balance:
            totals[LEAK_WEIGHT] = balance.leak_weight
        shares = retained_shares(recipe, self.records, self.plan.retained) if recipe.retain_by_leak else None
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(recipe.accumulation_steps):
            if self.processes.any(should_stop(), self.device):
                return None
            number = self.step * recipe.accumulation_steps + micro
            batch = self.processes.share(self.plan.batch(number, shares))
            anchor_weight = recipe.anchor_weight_at(number)
            loss, metrics = batch_loss(
                self.policy, self.plan.cache, batch, recipe, self.device, self.bank, anchor_weight, balance
            )
            metrics = self.processes.mean(metrics, self.device)
            self._check_finite("loss", metrics["loss"])
            (loss * (scale / recipe.accumulation_steps)).backward()
            for name, value in metrics.items():  # the anchor's is of some forward passes only
                counts[name] = counts.get(name, 0) + 1
                totals[name] = totals.get(name, 0.0) + (value - totals.get(name, 0.0)) / counts[name]
        self.processes.average_gradients(self.parameters.values())
        if scale != 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad /= scale
        totals["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters.values(), recipe.max_grad_norm))
        return totals

    def _balance(self) -> Balance | None:
        """Return what weighs the terms of the next step, for a recipe with `redirect`."""
        recipe = self.recipe
        if not recipe.redirect:
            return None
        assert recipe.leak_budget  # checked by the recipe
        contrast, weight = self.untrained["eval/contrast"], leak_weight_at(recipe, self.records)
        return Balance(contrast, weight, recipe.leak_budget, recipe.preference_weight)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise StepError(
                f"the {what} became {value} {self._where}; lower learning_rate or beta, or set precision to fp32"
            )

    def _measure(self, held_out: HeldOut) -> dict[str, float]:
        with self.weights(self.average):
            measured = held_out.measure(self.policy)
        if is_kept(measured, self._best, self.recipe, best_step=self.best_step):
            self.best_step = self.step
            self.best = {name: value.clone() for name, value in self.average.items()}
        return measured

    @property
    def _best(self) -> float:
        best = self.records[self.best_step - 1] if self.best_step else self.untrained
        return best[watched(self.recipe)]

    def _measure_untrained(self) -> None:
        """Measure the model without its LoRA, once: the same draws as every measurement, and its reference is kept."""
        if self.held_out and not self.untrained:
            self.untrained = self.held_out.measure(self.policy, is_untrained=True)
            if self.recipe.redirect:
                check_separation(self.untrained)

    @property
    def stop_reason(self) -> str | None:
        """Why there is no point in going on, or None."""
        return stop_reason(self.records, self.best_step, self.recipe)

    @property
    def shortfall(self) -> str | None:
        """What the best weights fall short of, in words, or None."""
        return shortfall(self.records, self.best_step, self.recipe)

    def finish(self) -> int:
        """Put what the expert is made of into the model and return the step it is from.

        With patience or a limit those are the best weights, else the averaged ones (the last, at ema_decay 0). 0: no
        measurement was better than the untrained model, so there is no expert.
        """
        best = self.held_out is not None and keeps_best(self.recipe)
        if best and self.held_out and self.records and not any("eval/loss" in record for record in self.records):
            self.records[-1] |= self._measure(self.held_out)  # stopped before the first measurement
        self._set_weights(self.best if best else self.average)
        return self.best_step if best else self.step

    def rescue(self) -> int:
        """After a StepError, put the best weights into the model, or else the averaged ones; return their step.

        0 where there are neither: the last weights alone may be what the error came from.
        """
        if self.best_step:
            self._set_weights(self.best)
            return self.best_step
        self._set_weights(self.average)
        return self.step if self.recipe.ema_decay else 0

    @contextlib.contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model carries `values` (say `average`) instead of the weights in training."""
        trained = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._set_weights(values)
        try:
            yield
        finally:
            self._set_weights(trained)

    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
