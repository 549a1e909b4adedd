"""Weighted sums without error: the factors are laid side by side, so ranks add up and nothing is rounded away.

Formula: A = [A_1; …; A_K], B = [c_1 s_1 B_1, …, c_K s_K B_K], so that B A = Σ_k c_k ΔW_k (s = alpha / rank).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .method import SCALE, Contribution, LayerTask, MergedLayer, MergeMethod


def concatenate(task: LayerTask, parts: Sequence[Contribution], coefficients: Sequence[float | Tensor]) -> MergedLayer:
    """Return Σ_k c_k · weight_k ΔW_k exactly; each part keeps its whole rank as a block.

    A single expert that nothing multiplies stays as it is, to the bit.

    Args:
        task: gives the layer's shape.
        parts: at least one.
        coefficients: one a part, a number or one number a row, [out].
    """
    if task.num_experts == 1 and parts[0].weight == 1.0 and coefficients[0] == 1.0:
        return MergedLayer(parts[0].layer, (parts[0].index,))
    ups, downs = [], []
    for part, coefficient in zip(parts, coefficients, strict=True):
        up, down = part.factors()
        ups.append(up * (coefficient[:, None] if isinstance(coefficient, Tensor) else coefficient))
        downs.append(down)
    layer = task.make_layer(torch.cat(ups, dim=1), torch.cat(downs))
    return MergedLayer(layer, tuple(part.index for part in parts))


def merge_linear(task: LayerTask) -> MergedLayer:
    """ΔW = Σ_k ΔW_k."""
    return concatenate(task, task.parts, [1.0] * len(task.parts))


def merge_average(task: LayerTask) -> MergedLayer:
    """ΔW = (1 / K) Σ_k ΔW_k over all K experts; who lacks the layer counts as zero."""
    return concatenate(task, task.parts, [1.0 / task.num_experts] * len(task.parts))


def merge_task_arithmetic(task: LayerTask) -> MergedLayer:
    """ΔW = scale · Σ_k ΔW_k."""
    return concatenate(task, task.parts, [task.parameters["scale"]] * len(task.parts))


METHODS = (
    MergeMethod(
        name="linear",
        title="Weighted sum",
        paper_url="https://arxiv.org/abs/2212.04089",
        summary="Adds the experts up, each with its weight. Ranks add up; one strength per category stays.",
        merge_layer=merge_linear,
    ),
    MergeMethod(
        name="average",
        title="Average",
        paper_url="https://arxiv.org/abs/2203.05482",
        summary="The sum divided by the number of experts. Ranks add up; one strength per category stays.",
        merge_layer=merge_average,
    ),
    MergeMethod(
        name="task-arithmetic",
        title="Task arithmetic",
        paper_url="https://arxiv.org/abs/2212.04089",
        summary="The sum times one scale. Ranks add up; one strength per category stays.",
        merge_layer=merge_task_arithmetic,
        parameters=(SCALE,),
    ),
    MergeMethod(
        name="fitted",
        title="Fitted sum",
        paper_url="https://arxiv.org/abs/2310.02575",
        summary="Adds the experts up, each as strongly as pairs of a dataset ask for: one strength each is trained "
        "by the preference loss with the anchor on safe prompts. Our own; the paper learns merge coefficients too, by "
        "another loss. Ranks add up; one strength per category stays.",
        merge_layer=merge_linear,
        needs_weights=True,
    ),
)
