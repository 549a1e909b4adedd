"""Which conditionings a category's expert should act on: those on the unsafe side of the category's concept direction.

With c the mean over the tokens of a conditioning, as the model gets it through cross-attention (rows of zeros are the
padding of Wan's text encoder and others, and are left out):

    direction = mean c(unsafe prompts) - mean c(safe prompts), normalised;  score = direction · c

A gate is open where the score is above its threshold.
The difference of means is the concept direction of representation engineering (Zou et al., arXiv:2310.01405).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Concept:
    """One category's direction [d] and threshold, and how well they told the prompts they were made of apart.

    Each prompt was judged by a direction made without it. Fractions are in 0..1; `other_rate` is the fraction of the
    other categories' unsafe prompts that open this gate too (0 where there are none).
    """

    direction: Tensor = field(repr=False)
    threshold: float
    recall: float
    num_unsafe: int
    false_positive_rate: float
    num_safe: int
    other_rate: float
    num_other: int


@dataclass(frozen=True)
class ConceptGate:
    """Category -> concept."""

    concepts: dict[str, Concept]

    @property
    def width(self) -> int:
        """Of the conditionings that it judges."""
        return len(next(iter(self.concepts.values())).direction)

    def scores(self, context: Tensor) -> Tensor:
        """Return each category's score [b, categories] of conditionings [b, t, d]."""
        directions = torch.stack([concept.direction for concept in self.concepts.values()])
        return mean_of_tokens(context) @ directions.to(context.device).T

    def margins(self, context: Tensor) -> Tensor:
        """Return scores minus their thresholds, [b, categories]: above 0 is unsafe."""
        thresholds = torch.tensor([concept.threshold for concept in self.concepts.values()], device=context.device)
        return self.scores(context) - thresholds

    def opened(self, context: Tensor) -> Tensor:
        """Return for which categories conditionings [b, t, d] are unsafe, bool [b, categories].

        A conditioning of zeros alone says nothing and opens none.
        """
        return (self.margins(context) > 0) & (context != 0).any(dim=2).any(dim=1)[:, None]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: opens on {concept.recall:.0%} of {concept.num_unsafe} unsafe prompts and on "
            f"{concept.false_positive_rate:.1%} of {concept.num_safe} safe ones, {concept.other_rate:.0%} of "
            f"{concept.num_other} of other categories; threshold {concept.threshold:.4g}"
            for name, concept in self.concepts.items()
        )


class Gate(Protocol):
    """What decides by a conditioning which categories may act: a concept gate, or what says the same in its place.

    Attributes:
        concepts: by category.
        width: of the conditionings that it judges; None: of any.
    """

    @property
    def concepts(self) -> Mapping[str, object]: ...

    @property
    def width(self) -> int | None: ...

    def opened(self, context: Tensor) -> Tensor:
        """Return for which categories conditionings [b, t, d] are unsafe, bool [b, categories]."""
        ...


def mean_of_tokens(context: Tensor) -> Tensor:
    """Return the mean [b, d] over the tokens of conditionings [b, t, d] that are not all zeros."""
    is_there = (context != 0).any(dim=2)
    return context.float().sum(dim=1) / is_there.sum(dim=1).clamp(min=1)[:, None]


def fit_concept_gate(
    unsafe: Mapping[str, Sequence[str]],
    safe: Mapping[str, Sequence[str]],
    encoded: Mapping[str, Tensor],
    false_positive_rate: float,
) -> ConceptGate:
    """Find each category's direction, and the lowest threshold that keeps its gate closed on safe prompts.

    Args:
        unsafe, safe: category -> different prompts, at least two. The gate of each category is to stay closed on the
            safe prompts of all of them, and on the empty prompt in any case.
        encoded: mean conditioning [d] (`mean_of_tokens`) of each of these prompts and of the empty one.
        false_positive_rate: fraction of the safe prompts that may open a gate, 0..1.

    Raises:
        InputError: a category has fewer than two different prompts of a kind, or the encoder does not tell them apart.
    """
    width = len(encoded[""])

    def stack(prompts: Iterable[str]) -> Tensor:
        rows = [encoded[prompt].float() for prompt in prompts]
        return torch.stack(rows) if rows else torch.empty(0, width)

    concepts = {}
    for name in sorted(unsafe):
        if min(len(unsafe[name]), len(safe[name])) < 2:
            raise InputError(
                f"{name} has {len(unsafe[name])} unsafe and {len(safe[name])} safe prompts; "
                "give at least two different ones of each"
            )
        own_unsafe, own_safe = stack(unsafe[name]), stack(safe[name])
        direction = own_unsafe.mean(dim=0) - own_safe.mean(dim=0)
        if direction.norm() <= 1e-5 * own_unsafe.norm(dim=1).mean():
            raise InputError(
                f"this text encoder gives the unsafe and safe prompts of {name} one meaning; use other prompts"
            )
        direction = direction / direction.norm()
        # The direction leans towards every prompt that it was made of, so each is judged by one made of the rest.
        unsafe_scores = _projections(own_unsafe, _means_of_the_rest(own_unsafe) - own_safe.mean(dim=0))
        safe_scores = _projections(own_safe, own_unsafe.mean(dim=0) - _means_of_the_rest(own_safe))
        safe_scores = torch.cat([safe_scores, stack(_others(safe, name)) @ direction])
        other_scores = stack(_others(unsafe, name)) @ direction
        lowest = max(_allowed(safe_scores, false_positive_rate), float(direction @ encoded[""].float()))
        # Half-way to the next unsafe prompt: the recall stays, and safe prompts never seen have room.
        above = unsafe_scores[unsafe_scores > lowest]
        threshold = (lowest + float(above.min())) / 2 if len(above) else lowest
        concepts[name] = Concept(
            direction,
            threshold,
            _fraction_above(unsafe_scores, threshold),
            len(unsafe_scores),
            _fraction_above(safe_scores, threshold),
            len(safe_scores),
            _fraction_above(other_scores, threshold),
            len(other_scores),
        )
    return ConceptGate(concepts)


def _others(prompts: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """Return the different prompts of the other categories that are none of this one's."""
    own = set(prompts[name])
    return list(dict.fromkeys(prompt for group in prompts.values() for prompt in group if prompt not in own))


def _allowed(scores: Tensor, rate: float) -> float:
    """Return the lowest threshold that at most this fraction of the scores is above."""
    return float(scores.sort(descending=True).values[min(int(rate * len(scores)), len(scores) - 1)])


def _fraction_above(scores: Tensor, threshold: float) -> float:
    return float((scores > threshold).double().mean()) if len(scores) else 0.0


def _means_of_the_rest(means: Tensor) -> Tensor:
    """Return for each row the mean of all other rows, [n, d]."""
    return (means.sum(dim=0) - means) / (len(means) - 1)


def _projections(means: Tensor, directions: Tensor) -> Tensor:
    """Return the length of each row along its own direction, [n]."""
    return (means * directions).sum(dim=1) / directions.norm(dim=1).clamp(min=torch.finfo().tiny)
