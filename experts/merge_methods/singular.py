"""Methods that work on singular vectors. All stay in the span of the stacked factors, so ΔW is never formed."""

import torch
from torch import Tensor

from .method import SCALE, LayerTask, MergedLayer, MergeMethod, Parameter, density
from .sparsification import elect_and_average, keep_largest
from .truncation import TRUNCATION, finish_factors


def merge_svd(task: LayerTask) -> MergedLayer:
    """ΔW = the best approximation of Σ_k ΔW_k at the wanted rank or energy."""
    up, down = _stack(task)
    return finish_factors(task, up, down)


def merge_knots(task: LayerTask) -> MergedLayer:
    """[ΔW_1 … ΔW_K] = U S [V_1 … V_K]ᵀ; the V_k, now in one space, are merged by TIES; ΔW = U S V_mergedᵀ.

    With B = Q R (stacked up) and A_k = L_k Q_kᵀ, the SVD of the wide matrix is that of the small R · diag(L_k).
    """
    ups, lowers, rows = [], [], []
    for part in task.parts:
        up, down = part.factors(torch.float64)
        q, r = torch.linalg.qr(down.T)
        ups.append(up)
        lowers.append(r.T)
        rows.append(q.T)
    q_up, r_up = torch.linalg.qr(torch.cat(ups, dim=1))
    u, s, vh = torch.linalg.svd(r_up @ torch.block_diag(*lowers), full_matrices=False)
    aligned = [
        block @ own_rows for block, own_rows in zip(vh.split([len(own) for own in rows], dim=1), rows, strict=True)
    ]
    real = s > s.max() * torch.finfo(torch.float32).eps  # the others' directions are noise, TIES would vote on them
    trimmed = [keep_largest(v[real], task.parameters["density"]) for v in aligned]
    merged = elect_and_average(torch.stack(trimmed)) * task.parameters["scale"]
    return finish_factors(task, (q_up @ u)[:, real] * s[real], merged)


def merge_tsv(task: LayerTask) -> MergedLayer:
    """Task singular vectors: ΔW = U⊥ diag(S_1 … S_K) V⊥ᵀ, with the experts' singular vectors made orthonormal.

    Each ΔW_k = U_k S_k V_kᵀ gives its leading `keep_fraction`; U⊥ = P Qᵀ from the SVD P D Qᵀ of [U_1 … U_K], V⊥ alike:
    the nearest orthonormal set, so that experts stop interfering.
    """
    lefts, values, rights = [], [], []
    for part in task.parts:
        up, down = part.factors(torch.float64)
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        num_kept = max(1, round(task.parameters["keep_fraction"] * len(s)))
        num_kept = min(num_kept, int((s > s.max() * torch.finfo(torch.float32).eps).sum()))
        lefts.append((q_up @ u)[:, :num_kept])
        values.append(s[:num_kept])
        rights.append((q_down @ vh.T)[:, :num_kept])
    left, right = _nearest_orthonormal(torch.cat(lefts, dim=1)), _nearest_orthonormal(torch.cat(rights, dim=1))
    return finish_factors(task, left * (task.parameters["scale"] * torch.cat(values)), right.T)


def _stack(task: LayerTask) -> tuple[Tensor, Tensor]:
    factors = [part.factors() for part in task.parts]
    return torch.cat([up for up, _ in factors], dim=1), torch.cat([down for _, down in factors])


def _nearest_orthonormal(vectors: Tensor) -> Tensor:
    if vectors.shape[1] == 0:
        return vectors
    q, r = torch.linalg.qr(vectors)
    u, _, vh = torch.linalg.svd(r, full_matrices=False)
    return q @ u @ vh


METHODS = (
    MergeMethod(
        name="svd",
        title="Truncated sum",
        paper_url="https://doi.org/10.1007/BF02288367",
        summary="The best approximation of the weighted sum at a smaller rank.",
        merge_layer=merge_svd,
        is_exact=False,
        parameters=TRUNCATION,
    ),
    MergeMethod(
        name="knots",
        title="KnOTS with TIES",
        paper_url="https://arxiv.org/abs/2410.19735",
        summary="Brings the experts into one space by a joint SVD and merges their right singular vectors by TIES.",
        merge_layer=merge_knots,
        is_exact=False,
        parameters=(density(0.2), SCALE, *TRUNCATION),
    ),
    MergeMethod(
        name="tsv",
        title="Task singular vectors",
        paper_url="https://arxiv.org/abs/2412.00081",
        summary="Makes the experts' singular vectors orthonormal before adding them, so that they interfere less.",
        merge_layer=merge_tsv,
        is_exact=False,
        parameters=(
            Parameter(
                "keep_fraction",
                1.0,
                "Fraction of each expert's singular vectors that stays.",
                minimum=0.001,
                maximum=1.0,
            ),
            SCALE,
            *TRUNCATION,
        ),
    ),
)
