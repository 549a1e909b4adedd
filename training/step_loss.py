"""The loss of one forward pass: objectives, anchor and SFT term, on one batch of pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.denoiser import conditions_on
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
from .reference_bank import ReferenceBank

LAST_TIMESTEP = 999


@dataclass(frozen=True)
class Predictions:
    """What policy and reference predict for a batch; the anchor's rows are empty where it is not computed."""

    pairs: PairPredictions
    anchor: Tensor  # [b or 0, c, h, w], of the policy
    reference_anchor: Tensor


def predict(
    policy: Policy,
    cache: PairCache,
    batch: Batch,
    device: torch.device,
    *,
    anchor: str | None = None,
    bank: ReferenceBank | None = None,
    is_untrained: bool = False,
) -> Predictions:
    """Run policy and reference on chosen, rejected and anchor samples in one batch, [2b or 3b, c, h, w].

    Args:
        anchor: "images", "noise" (see Recipe.anchor_samples) or None for no anchor rows.
        bank: the reference runs only for batches the bank has not seen.
        is_untrained: take the reference for the policy too, as before the first step.
    """
    size = len(batch.chosen)
    latents, noise = [batch.chosen, batch.rejected], [batch.noise, batch.noise]
    timesteps, prompts = [batch.timesteps, batch.rejected_timesteps], [*batch.prompts, *batch.prompts]
    if anchor:
        is_noise = anchor == "noise"
        latents.append(batch.chosen)
        noise.append(batch.anchor_noise)
        timesteps.append(torch.full_like(batch.timesteps, LAST_TIMESTEP) if is_noise else batch.anchor_timesteps)
        prompts += [""] * size if is_noise else batch.anchor_prompts
    all_latents, all_noise, all_timesteps = torch.cat(latents), torch.cat(noise), torch.cat(timesteps)
    x, eps, t = all_latents.to(device), all_noise.to(device), all_timesteps.to(device)
    conditions = conditions_on(device, cache.conditions(prompts))
    denoiser = policy.denoiser
    noisy, target = denoiser.add_noise(x, eps, t), denoiser.target(x, eps, t)
    if anchor == "noise":
        noisy[2 * size :] = denoiser.pure_noise(eps[2 * size :], t[2 * size :])

    def predict_reference() -> Tensor:
        with torch.no_grad(), policy.reference():
            return denoiser.predict(noisy, t, conditions)

    if bank:
        reference = bank.predict(all_latents, all_noise, all_timesteps, prompts, predict_reference).to(device)
    else:
        reference = predict_reference()
    predicted = reference if is_untrained else denoiser.predict(noisy, t, conditions)
    flags = batch.chosen_unsafe.to(device), batch.rejected_unsafe.to(device)
    policy_chosen, policy_rejected = predicted.split(size)[:2]
    reference_chosen, reference_rejected = reference.split(size)[:2]
    target_chosen, target_rejected = target.split(size)[:2]
    pairs = PairPredictions(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, target_chosen, target_rejected, *flags
    )
    return Predictions(pairs, predicted[2 * size :], reference[2 * size :])


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
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [], metrics) of one forward pass: the objectives, plus anchor and SFT terms where the recipe asks.

    Args:
        anchor_weight: of this forward pass, where it is not the recipe's (see Recipe.anchor_every).

    Metrics: `loss` and its parts `loss/preference` and, where computed, `loss/anchor` (the mean squared change on safe
    prompts); `drift` (the same on the pairs' own images); and those of `preference_metrics`.
    """
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
