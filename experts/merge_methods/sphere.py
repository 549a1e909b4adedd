"""Means on the sphere: directions of ΔW are averaged along great circles, norms apart from them.

Every step stays in the span of the experts, so only K coefficients are computed, from the Gram matrix
⟨ΔW_k, ΔW_l⟩ = Σ (B_kᵀ B_l) ∘ (A_k A_lᵀ), and the result is an exact concatenation. Angles are per layer.
"""

import torch
from torch import Tensor

from ...errors import InputError
from .concatenation import concatenate, merge_linear
from .method import LayerTask, MergedLayer, MergeMethod, Parameter

_PARALLEL = 1e-6  # below this sine the great circle is a straight line


def merge_slerp(task: LayerTask) -> MergedLayer:
    """ΔW = sin((1-t) Ω) / sin Ω · ΔW_1 + sin(t Ω) / sin Ω · ΔW_2, with Ω the angle between them.

    (Nearly) parallel ones, and a layer that only one has, are mixed linearly.
    """
    if task.num_experts == 1:
        return merge_linear(task)
    if task.num_experts > 2:
        raise InputError(f"slerp merges two experts, got {task.num_experts}; use karcher for more")
    t = task.parameters["t"]
    shares = torch.tensor([1.0 - t, t], dtype=torch.float64)
    gram = gram_matrix(task)
    if len(task.parts) == 2 and gram.diagonal().min() > 0:
        cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()
        angle = torch.arccos(cosine.clamp(-1.0, 1.0))
        if torch.sin(angle) > _PARALLEL:
            shares = torch.sin(shares * angle) / torch.sin(angle)
    return concatenate(task, task.parts, [float(shares[part.index]) for part in task.parts])


def merge_karcher(task: LayerTask) -> MergedLayer:
    """ΔW = (mean norm) · the unit vector with the least summed squared angles to all ΔW_k / ‖ΔW_k‖.

    Found by iterating m ← exp_m(mean_k log_m(u_k)) from the normalised sum. Layers that are zero do not vote.
    """
    if task.num_experts == 1:
        return merge_linear(task)
    gram = gram_matrix(task)
    norms = gram.diagonal().clamp(min=0).sqrt()
    voters = [index for index, norm in enumerate(norms) if norm > 0]
    if not voters:
        return MergedLayer(None, kept=())
    cosines = (gram / (norms[:, None] * norms))[voters][:, voters].clamp(-1.0, 1.0)
    mean = _karcher_coefficients(cosines, task.parameters["max_iterations"])
    coefficients = mean * norms[voters].mean() / norms[voters]
    return concatenate(task, [task.parts[index] for index in voters], coefficients.tolist())


def gram_matrix(task: LayerTask) -> Tensor:
    """Return ⟨ΔW_k, ΔW_l⟩ of a layer's parts, float64 on the CPU, [parts, parts]."""
    factors = [part.factors(torch.float64) for part in task.parts]
    gram = torch.empty(len(factors), len(factors), dtype=torch.float64)
    for k, (up_k, down_k) in enumerate(factors):
        for other, (up_l, down_l) in enumerate(factors[: k + 1]):
            gram[k, other] = gram[other, k] = ((up_k.T @ up_l) * (down_k @ down_l.T)).sum().cpu()
    return gram


def _karcher_coefficients(cosines: Tensor, max_iterations: int) -> Tensor:
    """Return c with Σ_k c_k u_k the Karcher mean of unit vectors u_k given by their cosines."""
    mean = torch.ones(len(cosines), dtype=torch.float64)
    length = (mean @ cosines @ mean).clamp(min=0).sqrt()
    if length < _PARALLEL:
        return mean / len(cosines)  # they cancel: every direction is as good, so is the plain average
    mean /= length
    for _ in range(max_iterations):
        cosine = (cosines @ mean).clamp(-1.0, 1.0)
        angle = torch.arccos(cosine)
        stretch = torch.where(torch.sin(angle) > _PARALLEL, angle / torch.sin(angle).clamp(min=_PARALLEL), 1.0)
        # log_m(u_k) = stretch_k (u_k - cosine_k m), averaged over k.
        step = stretch / len(cosines) - (stretch * cosine).mean() * mean
        size = (step @ cosines @ step).clamp(min=0).sqrt()
        if size < 1e-12:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
        mean /= (mean @ cosines @ mean).sqrt()
    return mean


METHODS = (
    MergeMethod(
        name="slerp",
        title="Spherical interpolation",
        paper_url="https://doi.org/10.1145/325334.325242",
        summary="Walks from the first of two experts to the second along the great circle, layer by layer.",
        merge_layer=merge_slerp,
        parameters=(Parameter("t", 0.5, "0 is the first expert, 1 the second.", minimum=0.0, maximum=1.0),),
    ),
    MergeMethod(
        name="karcher",
        title="Karcher mean",
        paper_url="https://doi.org/10.1002/cpa.3160300502",
        summary="The direction with the least squared angle to all experts, at their mean size, layer by layer.",
        merge_layer=merge_karcher,
        parameters=(Parameter("max_iterations", 100, "Stops earlier when it stands still.", minimum=1, maximum=10000),),
    ),
)
