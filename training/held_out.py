"""Pairs set aside to see whether an expert still gets better, and the weights of when it was best."""

from collections.abc import Sequence

import torch

from ..preferences.dataset import PreferencePair
from ..seeding import seeded_generator
from .batches import BatchPlan
from .cache import PairCache
from .objectives import anchor_loss, preference_metrics
from .policy import Policy
from .recipe import Recipe
from .reference_bank import ReferenceBank
from .step_loss import predict, preference_loss

DRAWS_PER_PAIR = 8


def split_pairs(pairs: Sequence[PreferencePair], recipe: Recipe) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Return (pairs to train on, pairs held out), by the recipe's fraction and seed; at least one is trained on."""
    num_held_out = min(len(pairs) - 1, round(len(pairs) * recipe.held_out_fraction))
    if recipe.held_out_fraction and not num_held_out and len(pairs) > 1:
        num_held_out = 1
    order = torch.randperm(len(pairs), generator=seeded_generator(recipe.seed, "held out")).tolist()
    held_out = set(order[:num_held_out])
    return (
        [pair for index, pair in enumerate(pairs) if index not in held_out],
        [pair for index, pair in enumerate(pairs) if index in held_out],
    )


class HeldOut:
    """Measures a model on held-out pairs, always with the same noises and timesteps."""

    def __init__(self, pairs: Sequence[PreferencePair], cache: PairCache, recipe: Recipe, device: torch.device):
        changes = {"caption_dropout_fraction": 0.0, "horizontal_flip": False}
        size = min(len(pairs), recipe.batch_size)
        self.recipe = recipe.model_copy(update={**changes, "batch_size": size})
        self.plan = BatchPlan(pairs, cache, self.recipe)
        self.device = device
        self.bank = ReferenceBank()
        self.num_batches = -(-len(pairs) * DRAWS_PER_PAIR // size)

    @torch.no_grad()
    def measure(self, policy: Policy, *, is_untrained: bool = False) -> dict[str, float]:
        """Return the means over all draws: eval/loss, eval/rewards/…, eval/drift, eval/chosen_increase.

        eval/loss is the recipe's preference loss, or the denoising error of the chosen images where it has none (recipe
        style); anchor, SFT term, flips and dropout count for nothing. eval/drift is the mean squared change of
        predictions on safe and empty prompts; eval/chosen_increase is by what part the chosen images' error is above
        the reference's (0.1: by a tenth), which tells a policy that only spoils the rejected images faster.

        Args:
            is_untrained: measure the model without its LoRA: what a training has to improve on.
        """
        totals: dict[str, float] = {}
        chosen = reference = 0.0
        for number in range(self.num_batches):
            predicted = predict(
                policy,
                self.plan.cache,
                self.plan.batch(number),
                self.device,
                anchor="images",
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
        return totals | {"eval/chosen_increase": chosen / reference - 1}
