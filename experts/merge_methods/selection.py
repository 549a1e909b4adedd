"""Co-Merge by row: every output row is taken from the expert that is most often the most active there.

    w(j) = argmax_k counts[k, j]    ΔW[j, :] = weight_w ΔW_w[j, :]        with w = w(j)

The result is exactly a LoRA: A = [A_1; …; A_K], and B holds expert k's winning rows in block k and zeros elsewhere.
Ties go to the earlier expert. A dead row (no count at all) is zero, unless there is only one expert. Experts that win
no row take no rank. Our reading (R1) of AlignGuard's Co-Merge, whose code is not published.
"""

import torch

from .concatenation import concatenate, merge_linear
from .method import LayerTask, MergedLayer


def merge_rows(task: LayerTask) -> MergedLayer:
    """ΔW[j, :] = weight · ΔW[j, :] of the expert with the largest count in row j."""
    if task.num_experts == 1:
        return merge_linear(task)
    assert task.counts is not None
    winners = row_winners(task.counts)
    chosen = [part for part in task.parts if bool((winners == part.index).any())]
    if not chosen:
        return MergedLayer(None, kept=())
    layer = concatenate(chosen, [winners == part.index for part in chosen])
    return MergedLayer(layer, tuple(part.index for part in chosen))


def row_winners(counts: torch.Tensor) -> torch.Tensor:
    """Return [out] int64: the winner of each row of counts [K, out], ties to the earlier expert, -1 for dead rows."""
    best = counts.amax(dim=0)
    # argmax promises no order among ties; the first True does.
    first = (counts == best).int().cumsum(dim=0).eq(0).sum(dim=0)
    return torch.where(best > 0, first, -1)
