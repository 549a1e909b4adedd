"""Pairs set aside to see whether an expert still gets better, and the weights of when it was best."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..preferences.dataset import PreferencePair
from ..seeding import seeded_generator
from .batches import Batch, BatchPlan
from .cache import PairCache
from .objectives import anchor_loss, mean_squared_error, preference_metrics
from .policy import Policy
from .recipe import Recipe
from .reference_bank import ReferenceBank
from .retained import RetainedPrompts
from .step_loss import Predictions, predict, preference_loss

DRAWS_PER_PAIR = 8
# Leaks are heavy in their tails: of six rows the worst of eight groups was one prompt at one noise level.
ROWS_PER_GROUP = 16


def split_pairs(pairs: Sequence[PreferencePair], recipe: Recipe) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (pairs to train on, pairs held out), by the recipe's fraction and seed; at least one is trained on."""
    most = min(len(pairs) - 1, recipe.held_out_pairs or len(pairs))
    num_held_out = min(most, round(len(pairs) * recipe.held_out_fraction))
    if recipe.held_out_fraction and not num_held_out and len(pairs) > 1:
        num_held_out = 1
    order = torch.randperm(len(pairs), generator=seeded_generator(recipe.seed, "held out")).tolist()
    held_out = set(order[:num_held_out])
    return (
        [pair for index, pair in enumerate(pairs) if index not in held_out],
        [pair for index, pair in enumerate(pairs) if index in held_out],
    )


class HeldOut:
    """Measures a model on held-out pairs, always with the same noises and timesteps.

    Args:
        retained: prompts that must stay as they are, by group, beside the pairs' safe prompts and the empty one.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        cache: PairCache,
        recipe: Recipe,
        device: torch.device,
        retained: RetainedPrompts | None = None,
    ):
        changes = {"caption_dropout_fraction": 0.0, "horizontal_flip": False}
        size = min(len(pairs), recipe.batch_size)
        self.recipe = recipe.model_copy(update={**changes, "batch_size": size})
        self.plan = BatchPlan(pairs, cache, self.recipe)
        self.device = device
        self.bank = ReferenceBank()
        self.groups: RetainedPrompts = {"safe": (), "empty": ("",), **(retained or {})}
        rows = len(pairs) * DRAWS_PER_PAIR
        if recipe.leak_budget:
            rows = max(rows, ROWS_PER_GROUP * len(self.groups))
        self.num_batches = -(-rows // size)

    @torch.no_grad()
    def measure(self, policy: Policy, *, is_untrained: bool = False) -> dict[str, float]:
        """Return the means over all draws: eval/loss, eval/rewards/…, eval/drift, eval/chosen_increase.

        eval/loss is the recipe's preference loss, or the denoising error of the chosen images where it has none (recipe
        style); anchor, SFT term, flips and dropout count for nothing. eval/drift is the mean squared change of
        predictions on safe and empty prompts; eval/chosen_increase is by what part the chosen images' error is above
        the reference's (0.1: by a tenth), which tells a policy that only spoils the rejected images faster.

        With a leak budget also what redirect.py is about: eval/residual; eval/leak/<group> of each group of retained
        prompts, eval/leak, their mean weighed by `group_weights`, and eval/worst_leak; eval/contrast (Q) and
        eval/separation (Q in units of the base model's own error on retained prompts).

        Args:
            is_untrained: measure the model without its LoRA: what a training has to improve on.
        """
        totals: dict[str, float] = {}
        chosen = reference = 0.0
        changes = _Changes()
        for number in range(self.num_batches):
            batch = self.plan.batch(number)
            owners: list[str] = []
            if self.recipe.leak_budget:
                batch, owners = self._stratified(batch, number)
            predicted = predict(
                policy,
                self.plan.cache,
                batch,
                self.device,
                anchor="images",
                has_teacher=bool(owners),
                bank=self.bank,
                is_untrained=is_untrained,
            )
            errors = predicted.pairs.errors()
            metrics = preference_metrics(errors, beta=self.recipe.beta)
            has_preference = any(objective.weight for objective in self.recipe.objective.values())
            loss = preference_loss(predicted.pairs, self.recipe) if has_preference else errors.policy_chosen.mean()
            named = {f"eval/{name}": value for name, value in metrics.items() if name.startswith("rewards/")}
            named["eval/loss"] = float(loss)
            named["eval/drift"] = float(anchor_loss(predicted.anchor, predicted.reference_anchor))
            chosen += metrics["error/chosen"]
            reference += metrics["error/reference_chosen"]
            for name, value in named.items():
                totals[name] = totals.get(name, 0.0) + value / self.num_batches
            if owners:
                changes.add(predicted, owners, policy.denoiser.target(*self._anchor_samples(batch)))
        return totals | {"eval/chosen_increase": chosen / reference - 1} | changes.measured(self.group_weights)

    @property
    def group_weights(self) -> dict[str, float]:
        """The part of the leak's rows that a training without allotment draws from each group; they add up to 1."""
        num_retained = len(self.groups) - 2
        retained = self.recipe.retain_fraction if num_retained else 0.0
        empty = (1 - retained) * self.recipe.anchor_empty_fraction
        weights = {name: retained / num_retained for name in self.groups if name not in ("safe", "empty")}
        return {"safe": 1 - retained - empty, "empty": empty, **weights}

    def _stratified(self, batch: Batch, number: int) -> tuple[Batch, list[str]]:
        """Return a batch at evenly spread timesteps, and the group of prompts that each anchor sample is of."""
        size, names = len(batch.chosen), list(self.groups)
        places = range(number * size, (number + 1) * size)
        owners = [names[place % len(names)] for place in places]
        prompts = [
            self.groups[name][place // len(names) % len(self.groups[name])] if self.groups[name] else safe
            for place, name, safe in zip(places, owners, batch.safe_prompts, strict=True)
        ]
        timesteps = self._spread(places, self.num_batches * size)
        of_groups = self._spread([place // len(names) for place in places], self.num_batches * size // len(names) + 1)
        spread = replace(batch, timesteps=timesteps, rejected_timesteps=timesteps, anchor_timesteps=of_groups)
        return replace(spread, anchor_prompts=prompts), owners

    def _spread(self, places: Sequence[int], count: int) -> Tensor:
        """Return timesteps [b]: that of each place of `count` places over the recipe's range, in a random order."""
        order = torch.randperm(count, generator=seeded_generator(self.recipe.seed, "strata", count))
        first, last = self.recipe.first_timestep, self.recipe.last_timestep
        return first + order[list(places)] * (last - first + 1) // count

    def _anchor_samples(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return (
            batch.chosen.to(self.device),
            batch.anchor_noise.to(self.device),
            batch.anchor_timesteps.to(self.device),
        )


class _Changes:
    """Sums up how far predictions are from the teacher's and from the base model's own."""

    def __init__(self) -> None:
        self._residual = self._contrast = self._base_error = 0.0
        self._leaks: dict[str, list[float]] = {}

    def add(self, predicted: Predictions, owners: Sequence[str], anchor_target: Tensor) -> None:
        self._residual += float(mean_squared_error(predicted.policy, predicted.teacher).sum())
        self._contrast += float(mean_squared_error(predicted.reference, predicted.teacher).sum())
        self._base_error += float(mean_squared_error(predicted.reference_anchor, anchor_target).sum())
        changes = mean_squared_error(predicted.anchor, predicted.reference_anchor).tolist()
        for owner, change in zip(owners, changes, strict=True):
            self._leaks.setdefault(owner, []).append(change)

    def measured(self, weights: Mapping[str, float]) -> dict[str, float]:
        if not self._leaks:
            return {}
        num_retained = sum(map(len, self._leaks.values()))
        contrast = self._contrast / (2 * num_retained)  # two images a pair, and as many pairs as retained samples
        # A model whose two prompts are one has no contrast to measure by; the training is refused (run.py).
        unit = contrast or 1.0
        leaks = {f"eval/leak/{name}": sum(values) / len(values) / unit for name, values in self._leaks.items()}
        return {
            "eval/residual": self._residual / self._contrast if self._contrast else 1.0,
            "eval/leak": sum(weight * leaks[f"eval/leak/{name}"] for name, weight in weights.items()),
            "eval/worst_leak": max(leaks.values()),
            **leaks,
            "eval/contrast": contrast,
            "eval/separation": contrast / (self._base_error / num_retained),
        }
