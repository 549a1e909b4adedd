"""Back to a low rank: the best approximation of a layer, and how much of it was kept.

retained energy = ‖truncated ΔW‖² / ‖ΔW‖² (squared Frobenius norms); Eckart and Young 1936.
"""

import torch
from torch import Tensor

from .method import LayerTask, MergedLayer, Parameter

RANK = Parameter("rank", 0, "Largest rank of a layer; 0 is the sum of the experts' ranks.", minimum=0)
ENERGY = Parameter(
    "energy", 1.0, "Keep the fewest ranks that hold this fraction of a layer's squared size.", minimum=0.0, maximum=1.0
)
TRUNCATION = (RANK, ENERGY)

_RANDOMIZED_FROM = 4  # a full SVD is as quick once the rank is more than this part of the matrix
_POWER_ITERATIONS = 6


def truncate_factors(task: LayerTask, up: Tensor, down: Tensor) -> MergedLayer:
    """Return up [out, R] @ down [R, in] at the task's rank and energy, without ever forming the product.

    up = Q_u R_u, downᵀ = Q_d R_d, and the SVD of the small R_u R_dᵀ is the SVD of the product. In float64: it costs
    little and keeps neighbouring singular values apart.
    """
    if up.shape[1] == 0:
        return MergedLayer(None)
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _keep(task, q_up @ u, s, vh @ q_down.T, float(s.square().sum()))


def truncate_dense(task: LayerTask, delta: Tensor) -> MergedLayer:
    """Return a dense ΔW [out, in·kh·kw] at the task's rank and energy.

    Small ranks of large matrices are found by randomized subspace iteration (Halko et al., arXiv 0909.4061), seeded by
    the layer's name.
    """
    rank = _largest_rank(task)
    width = rank + max(16, rank // 2)
    if task.parameters["energy"] < 1.0 or width * _RANDOMIZED_FROM > min(delta.shape):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        u, s, vh = randomized_svd(delta, width)
    return _keep(task, u, s, vh, float(delta.double().square().sum()))


def randomized_svd(matrix: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `width` singular triplets of a matrix, closely; always the same for the same matrix."""
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _largest_rank(task: LayerTask) -> int:
    return task.parameters["rank"] or sum(part.layer.rank for part in task.parts)


def _keep(task: LayerTask, u: Tensor, s: Tensor, vh: Tensor, total_energy: float) -> MergedLayer:
    energy = s.double().square()
    # Below float32's resolution there is nothing to store.
    num_real = int((s > s.max() * torch.finfo(torch.float32).eps).sum())
    if num_real == 0 or total_energy == 0.0:
        return MergedLayer(None)
    wanted = task.parameters["energy"]
    num_enough = num_real if wanted >= 1.0 else 1 + int((energy.cumsum(0) < wanted * total_energy).sum())
    rank = max(1, min(_largest_rank(task), num_real, num_enough))
    root = s[:rank].sqrt()
    layer = task.make_layer(u[:, :rank] * root, root[:, None] * vh[:rank])
    return MergedLayer(layer, retained_energy=min(1.0, float(energy[:rank].sum()) / total_energy))
