"""The loss of one forward pass: objectives, anchor and SFT term, on one batch of pairs."""

from dataclasses import fields

import torch
from torch import Tensor, nn

from ..models.denoiser import Denoiser
from .batches import Batch
from .cache import PairCache
from .lora import adapter_off
from .objectives import (
    OBJECTIVES,
    ObjectiveOptions,
    PairPredictions,
    anchor_loss,
    preference_metrics,
    preserve_winner,
)
from .recipe import Recipe
from .reference_bank import ReferenceBank


def batch_loss(
    model: nn.Module,
    denoiser: Denoiser,
    cache: PairCache,
    batch: Batch,
    recipe: Recipe,
    device: torch.device,
    bank: ReferenceBank | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return (loss [], metrics) of one forward pass: the objectives, plus anchor and SFT terms where the recipe asks.

    Policy and reference each see chosen, rejected and anchor samples in one batch, [2b or 3b, c, h, w]. With a `bank`
    the reference runs only for batches the bank has not seen.
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
    all_latents, all_noise, all_timesteps = torch.cat(latents), torch.cat(noise), torch.cat(timesteps)
    x, eps, t = all_latents.to(device), all_noise.to(device), all_timesteps.to(device)
    conditions = {name: value.to(device, torch.float32) for name, value in cache.conditions(prompts).items()}
    noisy, target = denoiser.add_noise(x, eps, t), denoiser.target(x, eps, t)
    if recipe.anchor_weight and recipe.anchor_samples == "noise":
        noisy[2 * size :] = eps[2 * size :]  # the schedule's last step still holds a little signal

    def predict_reference() -> Tensor:
        with torch.no_grad(), adapter_off(model):
            return denoiser.predict(noisy, t, conditions)

    if bank:
        reference = bank.predict(all_latents, all_noise, all_timesteps, prompts, predict_reference).to(device)
    else:
        reference = predict_reference()
    policy = denoiser.predict(noisy, t, conditions)

    policy_chosen, policy_rejected = policy.split(size)[:2]
    reference_chosen, reference_rejected = reference.split(size)[:2]
    target_chosen, target_rejected = target.split(size)[:2]
    predictions = PairPredictions(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        target_chosen,
        target_rejected,
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
