"""Methods that drop part of each dense ΔW_k, then add up or vote on signs; the result is truncated to a low rank.

Everything is done on ΔW, layer by layer. Run on the factors, as several mergers do, it is another method.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import InputError
from .method import SCALE, SEED, Contribution, LayerTask, MergedLayer, MergeMethod, Parameter, density
from .truncation import TRUNCATION, finish_dense


def merge_magnitude_prune(task: LayerTask) -> MergedLayer:
    """ΔW = Σ_k the `density` largest elements of ΔW_k."""
    return _add(task, lambda part: keep_largest(part.delta(), task.parameters["density"]))


def merge_dare(task: LayerTask) -> MergedLayer:
    """ΔW = Σ_k ΔW_k with random elements dropped, the rest divided by `density` to keep the expected sum."""
    return _add(task, lambda part: _drop_at_random(task, part))


def merge_breadcrumbs(task: LayerTask) -> MergedLayer:
    """ΔW = Σ_k ΔW_k without its `gamma` largest elements, of the rest those that make up `density`."""
    return _add(task, lambda part: keep_middle(part.delta(), task.parameters["density"], task.parameters["gamma"]))


def merge_ties(task: LayerTask) -> MergedLayer:
    """Trim each ΔW_k to its `density` largest elements, elect a sign for each element, average those that agree."""
    return _vote(task, lambda part: keep_largest(part.delta(), task.parameters["density"]))


def merge_dare_ties(task: LayerTask) -> MergedLayer:
    """DARE's random dropping, then the sign election and average of TIES."""
    return _vote(task, lambda part: _drop_at_random(task, part))


def merge_della(task: LayerTask) -> MergedLayer:
    """Drop small elements of each row more often than large ones (MagPrune), then elect and average as TIES does.

    An element of rank i (0 the smallest) among n in its row is kept with probability
    density - epsilon/2 + epsilon · i / (n - 1), and divided by it.
    """
    density, epsilon = task.parameters["density"], task.parameters["epsilon"]
    if density - epsilon / 2 <= 0 or density + epsilon / 2 > 1:
        raise InputError(
            f"della: density {density:g} ± epsilon {epsilon:g} / 2 must stay above 0 and up to 1; lower epsilon"
        )

    def drop(part: Contribution) -> Tensor:
        delta = part.delta()
        probability = della_probabilities(delta, density, epsilon)
        return torch.where(_uniform(task, part, delta) < probability, delta / probability, 0.0)

    return _vote(task, drop)


def keep_largest(delta: Tensor, fraction: float) -> Tensor:
    """Zero all but the largest `fraction` of a matrix by magnitude."""
    return keep_middle(delta, fraction, 0.0)


def keep_middle(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Zero the largest `gamma` and, of the rest, all but the largest `density` of all elements, by magnitude."""
    if density + gamma > 1.0 + 1e-9:
        raise InputError(f"density {density:g} and gamma {gamma:g} together are more than 1; lower one of them")
    num_top, num_kept = int(gamma * delta.numel()), int(density * delta.numel())
    order = delta.abs().flatten().topk(min(num_top + num_kept, delta.numel())).indices[num_top:]
    kept = torch.zeros_like(delta).flatten()
    kept[order] = delta.flatten()[order]
    return kept.reshape(delta.shape)


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability with which MagPrune keeps each element, [out, in]."""
    rank_in_row = delta.abs().argsort(dim=1).argsort(dim=1)
    return density - epsilon / 2 + epsilon * rank_in_row / max(delta.shape[1] - 1, 1)


def elect_and_average(deltas: Tensor) -> Tensor:
    """Return, for each element, the mean of those values [K, …] whose sign is that of their sum; zeros do not count."""
    agree = (deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)) & (deltas != 0)
    return (deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def _add(task: LayerTask, sparsify: Callable[[Contribution], Tensor]) -> MergedLayer:
    total = sparsify(task.parts[0])
    for part in task.parts[1:]:
        total += sparsify(part)
    return finish_dense(task, total * task.parameters["scale"])


def _vote(task: LayerTask, sparsify: Callable[[Contribution], Tensor]) -> MergedLayer:
    deltas = torch.stack([sparsify(part) for part in task.parts])
    return finish_dense(task, elect_and_average(deltas) * task.parameters["scale"])


def _drop_at_random(task: LayerTask, part: Contribution) -> Tensor:
    delta, density = part.delta(), task.parameters["density"]
    return torch.where(_uniform(task, part, delta) < density, delta / density, 0.0)


def _uniform(task: LayerTask, part: Contribution, delta: Tensor) -> Tensor:
    return torch.rand(delta.shape, generator=task.generator(part)).to(delta.device)


METHODS = (
    MergeMethod(
        name="ties",
        title="TIES",
        paper_url="https://arxiv.org/abs/2306.01708",
        summary="Keeps each expert's largest weights, elects a sign for each weight and averages those that agree.",
        merge_layer=merge_ties,
        is_exact=False,
        parameters=(density(0.2), SCALE, *TRUNCATION),
    ),
    MergeMethod(
        name="dare",
        title="DARE",
        paper_url="https://arxiv.org/abs/2311.03099",
        summary="Drops weights at random, rescales the rest and adds the experts up.",
        merge_layer=merge_dare,
        is_exact=False,
        parameters=(density(0.5), SCALE, SEED, *TRUNCATION),
    ),
    MergeMethod(
        name="dare-ties",
        title="DARE with TIES",
        paper_url="https://arxiv.org/abs/2311.03099",
        summary="Drops weights at random, rescales the rest, then elects signs and averages those that agree.",
        merge_layer=merge_dare_ties,
        is_exact=False,
        parameters=(density(0.5), SCALE, SEED, *TRUNCATION),
    ),
    MergeMethod(
        name="della",
        title="DELLA",
        paper_url="https://arxiv.org/abs/2406.11617",
        summary="Drops small weights more often than large ones, rescales, then elects signs and averages.",
        merge_layer=merge_della,
        is_exact=False,
        parameters=(
            density(0.5),
            Parameter("epsilon", 0.2, "Spread of the keep probability within a row.", minimum=0.0, maximum=1.0),
            SCALE,
            SEED,
            *TRUNCATION,
        ),
    ),
    MergeMethod(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        paper_url="https://arxiv.org/abs/2312.06795",
        summary="Drops the very largest and the small weights of each expert and adds the rest up.",
        merge_layer=merge_breadcrumbs,
        is_exact=False,
        parameters=(
            density(0.5),
            Parameter("gamma", 0.01, "Fraction of the largest weights dropped.", minimum=0.0, maximum=1.0),
            SCALE,
            *TRUNCATION,
        ),
    ),
    MergeMethod(
        name="magnitude-prune",
        title="Magnitude pruning",
        paper_url="https://arxiv.org/abs/1506.02626",
        summary="Keeps the largest weights of each expert and adds them up.",
        merge_layer=merge_magnitude_prune,
        is_exact=False,
        parameters=(density(0.2), SCALE, *TRUNCATION),
    ),
)
