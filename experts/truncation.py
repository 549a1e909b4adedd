"""The best low-rank approximation of a weight change, and how much of it was kept.

retained energy = ‖truncated ΔW‖² / ‖ΔW‖² (squared Frobenius norms); Eckart and Young 1936.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

_RANDOMIZED_FROM = 4  # a full SVD is as quick once the rank is more than this part of the matrix
_POWER_ITERATIONS = 6


@dataclass(frozen=True)
class Truncated:
    """up [out, r] @ down [r, in] with the singular values shared out evenly; retained_energy in 0..1."""

    up: Tensor
    down: Tensor
    retained_energy: float


def check_truncation(rank: int, energy: float) -> None:
    """Raise an InputError unless rank and energy ask for something."""
    if rank < 1:
        raise InputError(f"rank {rank} must be at least 1")
    if not 0.0 < energy <= 1.0:
        raise InputError(f"energy {energy:g} must be above 0 and at most 1")


def truncate_factors(up: Tensor, down: Tensor, rank: int, energy: float = 1.0) -> Truncated | None:
    """Approximate up [out, R] @ down [R, in] without ever forming it; None when it is zero.

    up = Q_u R_u, downᵀ = Q_d R_d, and the SVD of the small R_u R_dᵀ is the SVD of the product. In float64: it costs
    little and keeps neighbouring singular values apart.

    Args:
        rank: at most so many.
        energy: and no more than are needed to keep this fraction of ‖ΔW‖².
    """
    if up.shape[1] == 0:
        return None
    _check_finite(up, down)
    (up_reflectors, r_up), (down_reflectors, r_down) = _householder(up.double()), _householder(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    small = keep_leading(u, s, vh, float(s.square().sum()), rank, energy)
    if small is None:
        return None
    up, down = _times_q(up_reflectors, small.up), _times_q(down_reflectors, small.down.T).T
    return Truncated(up, down, small.retained_energy)


def _householder(matrix: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return (what makes up Q, R [k, n]) of the QR decomposition of [m, n], k = min(m, n); Q itself is not formed."""
    packed, scales = torch.geqrf(matrix)
    k = min(matrix.shape)
    return (packed[:, :k], scales), packed[:k].triu()


def _times_q(reflectors: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """Return Q [m, k] @ columns [k, r]."""
    packed, scales = reflectors
    padded = columns.new_zeros(packed.shape[0], columns.shape[1])
    padded[: columns.shape[0]] = columns
    return torch.ormqr(packed, scales, padded)


def truncate_dense(delta: Tensor, rank: int, energy: float = 1.0) -> Truncated | None:
    """Approximate a dense ΔW [out, in]; None when it is zero.

    Small ranks of large matrices are found by randomized subspace iteration (Halko et al., arXiv 0909.4061), seeded.
    """
    _check_finite(delta)
    width = rank + max(16, rank // 2)
    if energy < 1.0 or width * _RANDOMIZED_FROM > min(delta.shape):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        u, s, vh = randomized_svd(delta, width)
    return keep_leading(u, s, vh, float(delta.double().square().sum()), rank, energy)


def _check_finite(*matrices: Tensor) -> None:
    # An SVD of these fails after a long time, or does not end.
    if not all(bool(torch.isfinite(matrix).all()) for matrix in matrices):
        raise InputError("a layer's change is too large for its numbers; use smaller weights, or another copy")


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


def keep_leading(u: Tensor, s: Tensor, vh: Tensor, total_energy: float, rank: int, energy: float) -> Truncated | None:
    """Cut singular triplets u [out, n], s [n] (falling), vh [n, in] of a matrix with that ‖ΔW‖² to rank and energy."""
    held = s.double().square()
    # Below float32's resolution there is nothing to store.
    num_real = int((s > s.max() * torch.finfo(torch.float32).eps).sum())
    if num_real == 0 or total_energy == 0.0:
        return None
    num_enough = num_real if energy >= 1.0 else 1 + int((held.cumsum(0) < energy * total_energy).sum())
    num = max(1, min(rank, num_real, num_enough))
    root = s[:num].sqrt()
    retained = min(1.0, float(held[:num].sum()) / total_energy)
    return Truncated(u[:, :num] * root, root[:, None] * vh[:num], retained)
