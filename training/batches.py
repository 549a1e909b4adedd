"""Which pairs a step trains on, and every random draw of it: a function of the recipe's seed and the step alone.

Nothing here has state, so a resumed run sees what an uninterrupted one would have seen; shares of retained prompts come
from the run's records, which are kept.
"""

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..preferences.dataset import PreferencePair
from ..seeding import seeded_generator
from .cache import PairCache
from .recipe import Recipe
from .retained import RetainedPrompts


@dataclass(frozen=True)
class Batch:
    """b pairs. The noise is shared by the two images of a pair; the anchor has draws of its own."""

    chosen: Tensor  # [b, c, h, w] latents
    rejected: Tensor
    prompts: list[str]  # the condition of both images
    safe_prompts: list[str]  # what it should act as
    anchor_prompts: list[str]
    noise: Tensor  # [b, c, h, w]
    timesteps: Tensor  # [b] int64, of the chosen image
    rejected_timesteps: Tensor  # the same, unless the recipe draws two
    chosen_unsafe: Tensor  # [b] bool; an unknown flag counts as the pair's order says
    rejected_unsafe: Tensor
    anchor_noise: Tensor
    anchor_timesteps: Tensor


class BatchPlan:
    """Every epoch is a new order of the pairs, cut into batches of one latent size each.

    A last, short batch of a size is filled up from the start of that epoch's order.
    """

    def __init__(
        self, pairs: Sequence[PreferencePair], cache: PairCache, recipe: Recipe, retained: RetainedPrompts | None = None
    ):
        self.pairs, self.cache, self.recipe = list(pairs), cache, recipe
        self.retained = retained or {}
        self._shapes = [tuple(cache.latents(pair)[0].shape) for pair in self.pairs]
        self._epoch_batches = len(self._order(0))
        self._bank_size = recipe.reference_epochs * self._epoch_batches

    def _order(self, epoch: int) -> list[list[int]]:
        generator = seeded_generator(self.recipe.seed, "order", epoch)
        by_shape: dict[tuple, list[int]] = {}
        for index in torch.randperm(len(self.pairs), generator=generator).tolist():
            by_shape.setdefault(self._shapes[index], []).append(index)
        size = self.recipe.batch_size
        batches = []
        for _, indices in sorted(by_shape.items()):
            filled = [indices[i % len(indices)] for i in range(-(-len(indices) // size) * size)]
            batches += [filled[start : start + size] for start in range(0, len(filled), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def batch(self, number: int, shares: Mapping[str, float] | None = None) -> Batch:
        """Return the `number`-th forward pass of the run (from 0).

        After the recipe's `reference_epochs` the same batches come again, draws and all, each time in a new order.

        Args:
            shares: how often each group of retained prompts is drawn, adding up to 1; None: equally often.
        """
        recipe = self.recipe
        if self._bank_size and number >= self._bank_size:
            cycle, position = divmod(number, self._bank_size)
            generator = seeded_generator(recipe.seed, "bank", cycle)
            number = int(torch.randperm(self._bank_size, generator=generator)[position])
        epoch, position = divmod(number, self._epoch_batches)
        pairs = [self.pairs[index] for index in self._order(epoch)[position]]
        generator = seeded_generator(recipe.seed, "batch", number)
        # One draw of each kind for every pair, used or not: options do not shift each other's randomness.
        flip, drop, empty = torch.rand(3, len(pairs), generator=generator)
        flipped = flip < (0.5 if recipe.horizontal_flip else 0.0)
        latents = [self.cache.latents(pair, flipped=bool(mirror)) for pair, mirror in zip(pairs, flipped, strict=True)]
        chosen = torch.stack([chosen for chosen, _ in latents])

        def draw() -> Tensor:
            return torch.randn(chosen.shape, generator=generator)

        def timesteps() -> Tensor:
            return torch.randint(recipe.first_timestep, recipe.last_timestep + 1, (len(pairs),), generator=generator)

        noise, chosen_timesteps, rejected_timesteps = draw(), timesteps(), timesteps()
        return Batch(
            chosen=chosen,
            rejected=torch.stack([rejected for _, rejected in latents]),
            prompts=[
                "" if value < recipe.caption_dropout_fraction else pair.prompt
                for pair, value in zip(pairs, drop, strict=True)
            ],
            safe_prompts=[
                "" if value < recipe.caption_dropout_fraction else pair.safe_prompt
                for pair, value in zip(pairs, drop, strict=True)
            ],
            anchor_prompts=self._retained_in_part(
                [
                    "" if value < recipe.anchor_empty_fraction else pair.safe_prompt
                    for pair, value in zip(pairs, empty, strict=True)
                ],
                number,
                shares,
            ),
            noise=noise,
            timesteps=chosen_timesteps,
            rejected_timesteps=chosen_timesteps if recipe.shared_timestep else rejected_timesteps,
            chosen_unsafe=torch.tensor([bool(pair.chosen_unsafe) for pair in pairs]),
            rejected_unsafe=torch.tensor([pair.rejected_unsafe is not False for pair in pairs]),
            anchor_noise=draw(),
            anchor_timesteps=timesteps(),
        )

    def _retained_in_part(self, prompts: list[str], number: int, shares: Mapping[str, float] | None) -> list[str]:
        """Return the prompts, a random part of them replaced by retained ones, of each group by its share."""
        if not self.retained:
            return prompts
        generator = seeded_generator(self.recipe.seed, "retained", number)
        replaced, which, of_group = torch.rand(3, len(prompts), generator=generator).tolist()
        groups = list(self.retained.values())
        ends = list(accumulate((shares or {}).get(name, 0.0) for name in self.retained))
        drawn = []
        for position, prompt in enumerate(prompts):
            place = bisect(ends, which[position] * ends[-1]) if shares else int(which[position] * len(groups))
            group = groups[min(place, len(groups) - 1)]
            other = group[int(of_group[position] * len(group))]
            drawn.append(other if replaced[position] < self.recipe.retain_fraction else prompt)
        return drawn
