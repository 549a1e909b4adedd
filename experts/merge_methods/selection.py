"""Co-Merge: every piece of a layer comes from one expert, the most active one there. No piece is mixed.

AlignGuard's code for it is not published; these are our readings of its figure, exact where they can be:

    row      ΔW[j, :] = ΔW_w[j, :],  w = argmax_k strength[k, j]      a LoRA: rank block k holds the rows k won
    layer    ΔW = ΔW_w,              w = argmax_k Σ_j strength[k, j]  a LoRA
    factor   A[i, m] from argmax_k |A_k[i, m]|, B[j, i] from argmax_k |s_k B_k[j, i]|; rank stays, needs equal ranks
    weight   ΔW[j, m] from argmax_k |ΔW_k[j, m]|; dense, then truncated

With activations, strength[k, j] counts how often k is the most active in row j. Without data it is ‖ΔW_k[j, :]‖. Inputs
shared by all experts cancel in `weight` (and in A of `factor`), so it needs no data by its nature.
Ties go to the earlier expert. A dead row, where nobody is active, is zero. Experts that win nothing take no rank.
"""

import torch
from torch import Tensor

from ...errors import InputError
from .concatenation import concatenate, merge_linear
from .method import LayerTask, MergedLayer, MergeMethod, Parameter
from .truncation import TRUNCATION, finish_dense


def merge_by_activation(task: LayerTask) -> MergedLayer:
    """Select rows or the layer by activation counts."""
    if task.num_experts == 1:
        return merge_linear(task)  # no contest
    assert task.counts is not None
    return _select(task, task.counts)


def merge_by_weight(task: LayerTask) -> MergedLayer:
    """Select rows, the layer, factor elements or weights by size alone."""
    if task.num_experts == 1:
        return merge_linear(task)
    if task.parameters["granularity"] == "factor":
        return _select_factor_elements(task)
    if task.parameters["granularity"] == "weight":
        deltas = torch.stack([part.delta() for part in task.parts])
        return finish_dense(task, deltas.gather(0, first_largest(deltas.abs())[None])[0])
    return _select(task, _row_norms(task))


def merge_patches(task: LayerTask) -> MergedLayer:
    """Keep the rows that are among the largest of exactly one expert; rows that several want go from all of them."""
    if task.num_experts == 1:
        return merge_linear(task)
    own = only_in_one(_row_norms(task), task.parameters["share"])
    chosen = [part for part in task.parts if bool(own[part.index].any())]
    if not chosen:
        return MergedLayer(None, kept=())
    return concatenate(task, chosen, [own[part.index].float() for part in chosen])


def only_in_one(strength: Tensor, share: float) -> Tensor:
    """Return [K, out] bool: rows in the top share of strength [K, out] of this expert, and of no other one."""
    num_top = max(1, round(share * strength.shape[1]))
    places = strength.argsort(dim=1, descending=True, stable=True)[:, :num_top]
    is_top = torch.zeros_like(strength, dtype=torch.bool).scatter(1, places, True) & (strength > 0)
    return is_top & (is_top.sum(dim=0) == 1)


def _row_norms(task: LayerTask) -> Tensor:
    """Return the norms of the rows of weight · ΔW [K, out], zeros for experts without the layer."""
    norms = torch.zeros(task.num_experts, task.parts[0].layer.up.shape[0], device=task.parts[0].layer.up.device)
    for part in task.parts:
        up, down = part.factors()
        triangle = torch.linalg.qr(down.T).R  # down = triangle.T @ orthonormal rows
        norms[part.index] = (up @ triangle.T).norm(dim=1)
    return norms


def row_winners(strength: Tensor) -> Tensor:
    """Return [out] int64: the winner of each row of strength [K, out], ties to the earlier expert, -1 for dead rows."""
    return torch.where(strength.amax(dim=0) > 0, first_largest(strength), -1)


def first_largest(values: Tensor) -> Tensor:
    """Return the index of the largest value along the first dimension; of equal ones the first."""
    best = values.amax(dim=0)
    return (values == best).cummax(dim=0).values.logical_not().sum(dim=0)  # argmax promises no order among ties


def _select(task: LayerTask, strength: Tensor) -> MergedLayer:
    if task.parameters["granularity"] == "layer":
        strength = strength.sum(dim=1, keepdim=True).expand_as(strength)
    winners = row_winners(strength)
    chosen = [part for part in task.parts if bool((winners == part.index).any())]
    if not chosen:
        return MergedLayer(None, kept=())
    return concatenate(task, chosen, [(winners == part.index).float() for part in chosen])


def _select_factor_elements(task: LayerTask) -> MergedLayer:
    ranks = {part.layer.rank for part in task.parts}
    if len(ranks) > 1:
        raise InputError(
            f"layer {task.name} has ranks {sorted(ranks)}; granularity factor needs experts of one rank, use row"
        )
    ups, downs = (torch.stack(factors) for factors in zip(*(part.factors() for part in task.parts), strict=True))
    up = ups.gather(0, first_largest(ups.abs())[None])[0]
    down = downs.gather(0, first_largest(downs.abs())[None])[0]
    return MergedLayer(task.make_layer(up, down))


METHODS = (
    MergeMethod(
        name="co-merge",
        title="Co-Merge",
        paper_url="https://arxiv.org/abs/2412.10493",
        summary="Takes each output row (or layer) from the expert that is most often the most active there. Ranks add "
        "up; one strength per category stays. Our reading of the paper's figure; its code is not published.",
        merge_layer=merge_by_activation,
        needs_counts=True,
        parameters=(
            Parameter("granularity", "row", "What comes from one expert as a whole.", choices=("row", "layer")),
        ),
    ),
    MergeMethod(
        name="co-merge-weights",
        title="Co-Merge without data",
        paper_url="https://arxiv.org/abs/2412.10493",
        summary="Co-Merge by the size of weights instead of activations: not the paper's method, a fallback that needs "
        "no prompts. Granularity weight is dense and truncated; factor suits experts trained from one seed.",
        merge_layer=merge_by_weight,
        is_exact=False,
        parameters=(
            Parameter(
                "granularity",
                "row",
                "What comes from one expert as a whole.",
                choices=("row", "layer", "factor", "weight"),
            ),
            *TRUNCATION,
        ),
    ),
    MergeMethod(
        name="patch",
        title="Patches of single experts (SafePatching)",
        paper_url="https://arxiv.org/abs/2405.13820",
        summary="Keeps the output rows that are among the largest of exactly one expert; rows that several want are "
        "dropped from all. By row norms, without data: our reading of the paper's set differences; not measured.",
        merge_layer=merge_patches,
        parameters=(
            Parameter("share", 0.5, "Part of the rows that counts as an expert's own.", minimum=0.001, maximum=1.0),
        ),
    ),
)
