"""Weighted sums without error: the factors are laid side by side, so ranks add up and nothing is rounded away.

A = [A_1; …; A_K]    B = [w_1 s_1 B_1, …, w_K s_K B_K]    ⇒    B A = Σ_k w_k ΔW_k        s = alpha / rank
"""

from collections.abc import Sequence

import torch

from ..expert import LoraLayer
from .method import LayerTask, MergedLayer, Part


def concatenate(parts: Sequence[Part], row_masks: Sequence[torch.Tensor] | None = None) -> LoraLayer:
    """Return Σ_k w_k ΔW_k as one layer, float32, alpha = rank.

    Args:
        parts: at least one.
        row_masks: for each part [out] bool; False rows of its ΔW are left out.
    """
    downs, ups = [], []
    for position, part in enumerate(parts):
        up = part.layer.up.float() * (part.weight * part.layer.scale)
        if row_masks is not None:
            up = up * row_masks[position].to(up).reshape(-1, *[1] * (up.ndim - 1))
        downs.append(part.layer.down.float())
        ups.append(up)
    down = torch.cat(downs)
    return LoraLayer(down, torch.cat(ups, dim=1), float(down.shape[0]))


def merge_linear(task: LayerTask) -> MergedLayer:
    """ΔW = Σ_k w_k ΔW_k."""
    kept = tuple(part.index for part in task.parts)
    if task.num_experts == 1 and task.parts[0].weight == 1.0:
        return MergedLayer(task.parts[0].layer, kept)  # the identity, to the bit
    return MergedLayer(concatenate(task.parts), kept)
