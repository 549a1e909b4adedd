"""The loss of one forward pass: objectives, anchor and SFT term, on one batch of pairs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.denoiser import Conditions, conditions_on
from .batches import Batch
from .cache import PairCache
from .objectives import (
    OBJECTIVES,
    PairPredictions,
    anchor_loss,
    mean_squared_error,
    preference_metrics,
    preserve_winner,
)
from .policy import Policy
from .recipe import Recipe
from .redirect import LEAK, RESIDUAL, Balance, relative_change
from .reference_bank import ReferenceBank

LAST_TIMESTEP = 999


@dataclass(frozen=True)
class Predictions:
    """What policy and base model predict for a batch, each [rows, c, h, w]; rows that were not asked for are missing.

    Args:
        policy: of the chosen, then the rejected images, 2b rows under the pair's prompt; `target` is theirs.
        reference: the base model's of the same.
        teacher: the base model's of the same images under the safe prompt.
        anchor, reference_anchor: of b anchor samples.
        chosen_unsafe, rejected_unsafe: [b] bool, from the dataset.
    """

    policy: Tensor
    target: Tensor
    reference: Tensor
    teacher: Tensor
    anchor: Tensor
    reference_anchor: Tensor
    chosen_unsafe: Tensor
    rejected_unsafe: Tensor

    @property
    def pairs(self) -> PairPredictions:
        """What an objective looks at."""
        policy_chosen, policy_rejected = self.policy.chunk(2)
        reference_chosen, reference_rejected = self.reference.chunk(2)
        target_chosen, target_rejected = self.target.chunk(2)
        return PairPredictions(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            target_chosen,
            target_rejected,
            self.chosen_unsafe,
            self.rejected_unsafe,
        )


@dataclass(frozen=True)
class _Rows:
    """Samples on the CPU and the prompts they are denoised under; the last `num_pure` are noise alone."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompts: list[str]
    num_pure: int = 0

    @property
    def keys(self) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """What a reference bank knows them by."""
        return self.latents, self.noise, self.timesteps, self.prompts

    def followed_by(self, others: "_Rows | None") -> "_Rows":
        if others is None:
            return self
        return _Rows(
            torch.cat([self.latents, others.latents]),
            torch.cat([self.noise, others.noise]),
            torch.cat([self.timesteps, others.timesteps]),
            [*self.prompts, *others.prompts],
            others.num_pure,
        )


def predict(
    policy: Policy,
    cache: PairCache,
    batch: Batch,
    device: torch.device,
    *,
    anchor: str | None = None,
    has_reference: bool = True,
    has_teacher: bool = False,
    bank: ReferenceBank | None = None,
    is_untrained: bool = False,
) -> Predictions:
    """Run the policy on chosen, rejected and anchor samples in one batch, and the base model likewise.

    Args:
        anchor: "images", "noise" (see Recipe.anchor_samples) or None for no anchor rows.
        has_reference: run the base model on the pairs under their prompt; without, there must be a teacher.
        has_teacher: run it on them under the safe prompt.
        bank: the base model runs only for batches the bank has not seen.
        is_untrained: take the reference for the policy too, as before the first step.
    """
    size = len(batch.chosen)
    pairs, anchors = _pair_rows(batch), _anchor_rows(batch, anchor)
    safe_pairs = replace(pairs, prompts=[*batch.safe_prompts, *batch.safe_prompts])
    rows = pairs.followed_by(anchors)
    denoiser = policy.denoiser

    def inputs(rows: _Rows) -> tuple[Tensor, Tensor, Conditions]:
        x, eps, t = rows.latents.to(device), rows.noise.to(device), rows.timesteps.to(device)
        noisy = denoiser.add_noise(x, eps, t)
        if rows.num_pure:
            noisy[-rows.num_pure :] = denoiser.pure_noise(eps[-rows.num_pure :], t[-rows.num_pure :])
        return noisy, t, conditions_on(device, cache.conditions(rows.prompts))

    def base(rows: _Rows, given: tuple[Tensor, Tensor, Conditions]) -> Tensor:
        def compute() -> Tensor:
            with torch.no_grad(), policy.reference():
                return denoiser.predict(*given)

        return bank.predict(*rows.keys, compute).to(device) if bank else compute()

    given = inputs(rows)
    # Batches of one size: a model may round otherwise in another, and without a LoRA all has to be equal.
    if has_reference:
        reference, reference_anchor = base(rows, given).tensor_split([2 * size])
        teacher = base(safe_pairs, inputs(safe_pairs)) if has_teacher else reference[:0]
    else:
        safe_rows = safe_pairs.followed_by(anchors)
        teacher, reference_anchor = base(safe_rows, inputs(safe_rows)).tensor_split([2 * size])
        reference = teacher[:0]
    predicted = torch.cat([reference, reference_anchor]) if is_untrained else denoiser.predict(*given)
    x, eps, t = pairs.latents.to(device), pairs.noise.to(device), pairs.timesteps.to(device)
    return Predictions(
        policy=predicted[: 2 * size],
        target=denoiser.target(x, eps, t),
        reference=reference,
        teacher=teacher,
        anchor=predicted[2 * size :],
        reference_anchor=reference_anchor,
        chosen_unsafe=batch.chosen_unsafe.to(device),
        rejected_unsafe=batch.rejected_unsafe.to(device),
    )


def _pair_rows(batch: Batch) -> _Rows:
    """Return the chosen, then the rejected samples under the pair's prompt."""
    return _Rows(
        torch.cat([batch.chosen, batch.rejected]),
        torch.cat([batch.noise, batch.noise]),
        torch.cat([batch.timesteps, batch.rejected_timesteps]),
        [*batch.prompts, *batch.prompts],
    )


def _anchor_rows(batch: Batch, anchor: str | None) -> _Rows | None:
    if anchor is None:
        return None
    if anchor == "noise":
        last = torch.full_like(batch.timesteps, LAST_TIMESTEP)
        return _Rows(batch.chosen, batch.anchor_noise, last, [""] * len(batch.chosen), len(batch.chosen))
    return _Rows(batch.chosen, batch.anchor_noise, batch.anchor_timesteps, batch.anchor_prompts)


def preference_loss(predictions: PairPredictions, recipe: Recipe) -> Tensor:
    """Return the recipe's objectives, weighed and added up, as the mean over the pairs: []."""
    loss = torch.zeros((), device=predictions.policy_chosen.device)
    for name, chosen in recipe.objective.items():
        if chosen.weight:
            loss = loss + chosen.weight * OBJECTIVES[name].loss(predictions, recipe.beta, chosen).mean()
    return loss


def drift(predictions: PairPredictions) -> Tensor:
    """Return the mean squared change of the predictions on both images from what the base model predicts: []."""
    chosen = mean_squared_error(predictions.policy_chosen, predictions.reference_chosen)
    rejected = mean_squared_error(predictions.policy_rejected, predictions.reference_rejected)
    return (chosen.mean() + rejected.mean()) / 2


def batch_loss(
    policy: Policy,
    cache: PairCache,
    batch: Batch,
    recipe: Recipe,
    device: torch.device,
    bank: ReferenceBank | None = None,
    anchor_weight: float | None = None,
    balance: Balance | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [], metrics) of one forward pass: the objectives, plus anchor and SFT terms where the recipe asks.

    Args:
        anchor_weight: of this forward pass, where it is not the recipe's (see Recipe.anchor_every).
        balance: of a recipe with `redirect`, whose loss is another (redirect.py): it computes the leak always.

    Metrics: `loss` and its parts `loss/preference` and, where computed, `loss/anchor` (the mean squared change on safe
    prompts); `drift` (the same on the pairs' own images); and those of `preference_metrics`.
    """
    if balance:
        return _redirect_loss(policy, cache, batch, recipe, device, bank, balance)
    weight = recipe.anchor_weight if anchor_weight is None else anchor_weight
    anchor = recipe.anchor_samples if weight else None
    predicted = predict(policy, cache, batch, device, anchor=anchor, bank=bank)
    pairs = predicted.pairs
    if recipe.winner_preserving is not None:
        pairs = preserve_winner(pairs, recipe.winner_preserving)
    errors = pairs.errors()
    loss = preference_loss(pairs, recipe)
    metrics = {"loss/preference": float(loss.detach()), "drift": float(drift(pairs).detach())}
    metrics |= preference_metrics(errors, beta=recipe.beta)
    if recipe.sft_weight:
        loss = loss + recipe.sft_weight * errors.policy_chosen.mean()
    if anchor:
        change = anchor_loss(predicted.anchor, predicted.reference_anchor)
        metrics["loss/anchor"] = float(change.detach())
        loss = loss + weight * change
    return loss, {"loss": float(loss.detach()), **metrics}


def _redirect_loss(
    policy: Policy,
    cache: PairCache,
    batch: Batch,
    recipe: Recipe,
    device: torch.device,
    bank: ReferenceBank | None,
    balance: Balance,
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [], metrics) of a recipe with `redirect`; its preference terms are computed where it has some."""
    has_preference = bool(balance.preference_weight)
    predicted = predict(
        policy, cache, batch, device, anchor="images", has_reference=has_preference, has_teacher=True, bank=bank
    )
    residual = relative_change(predicted.policy, predicted.teacher, balance.contrast)
    leak = relative_change(predicted.anchor, predicted.reference_anchor, balance.contrast)
    metrics = {RESIDUAL: float(residual.detach()), LEAK: float(leak.detach())}
    preference = torch.zeros((), device=device)
    if has_preference:
        in_contrasts = recipe.model_copy(update={"beta": recipe.beta / balance.contrast})
        preference = preference_loss(predicted.pairs, in_contrasts)
        metrics |= {"loss/preference": float(preference.detach())}
        metrics |= preference_metrics(predicted.pairs.errors(), beta=in_contrasts.beta)
    loss = balance.loss(residual, leak, preference)
    return loss, {"loss": float(loss.detach()), **metrics}
