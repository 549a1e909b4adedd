"""Distances between two sets of pictures, over any features of theirs, in float64.

KID: Binkowski et al. 2018 (polynomial kernel of degree 3). CMMD: Jayasumana et al. 2024 (Gaussian kernel of width 10 on
unit vectors, times 1000). Both as the unbiased U-statistic, so that two sets of one distribution give 0 on average and
small negative values are right; the paper's CMMD code is the biased one. Frechet: Heusel et al. 2017.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .statistics import DRAWS, expanded_tails, prompt_draws

FRECHET_MIN = 2048  # below, the bias of a Frechet distance is larger than what it is to show
_MANY, _FEWER_DRAWS = 2000, 1000

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Distance:
    """A distance with its 95 % interval over resampled prompts (None: too few)."""

    value: float
    low: float | None
    high: float | None
    n: int


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (x·y / d + 1)³ [n, m] of features [n, d] and [m, d]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, width: float = 10.0) -> np.ndarray:
    """Return exp(−|x − y|² / 2 width²) [n, m]."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return np.exp(-np.maximum(squares, 0) / (2 * width * width))


def paired_mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel, scale: float = 1.0) -> Distance:
    """Return the unbiased squared MMD of pictures of the same prompts.

    Terms of one prompt are left out, also between x and y: pictures of one prompt are alike, which would make two sets
    of one distribution look nearer than they are.

    Args:
        x, y: [n, d]; row i of both belongs to one prompt.

    Raises:
        ValueError: there are fewer than two rows, or not as many in both.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    if x.shape != y.shape or n < 2:
        raise ValueError(f"needs two or more rows of the same shape, not {x.shape} and {y.shape}")
    cross = kernel(x, y)
    terms = kernel(x, x) + kernel(y, y) - cross - cross.T
    np.fill_diagonal(terms, 0)
    value = terms.sum() / (n * (n - 1))
    if n < 10:
        return Distance(float(scale * value), None, None, n)
    times = prompt_draws(n, DRAWS if n <= _MANY else _FEWER_DRAWS).astype(np.float64)
    sums = ((times @ terms) * times).sum(1)
    # A prompt drawn several times is no pair with itself.
    num_pairs = times.sum(1) ** 2 - (times * times).sum(1)
    low, high = np.quantile(scale * sums / num_pairs, expanded_tails(n))
    return Distance(float(scale * value), float(low), float(high), n)


def kid(x: np.ndarray, y: np.ndarray) -> Distance:
    """Return the kernel distance of features [n, d] of the same prompts."""
    return paired_mmd(x, y, polynomial_kernel)


def cmmd(x: np.ndarray, y: np.ndarray) -> Distance:
    """Return CMMD of CLIP embeddings [n, d], normalised here, of the same prompts."""
    x, y = (np.asarray(z, dtype=np.float64) for z in (x, y))
    unit = [z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (x, y)]
    return paired_mmd(unit[0], unit[1], gaussian_kernel, 1000.0)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """Return |m1 − m2|² + tr S1 + tr S2 − 2 tr (S1 S2)^½ of features [n, d] and [m, d], S unbiased.

    tr (S1 S2)^½ is the nuclear norm of X1c X2c' / √((n−1)(m−1)), which needs no root of a d x d matrix.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred = [z - z.mean(0) for z in (x, y)]
    traces = sum(float((z * z).sum()) / (len(z) - 1) for z in centred)
    if min(len(x), len(y)) <= x.shape[1]:
        product = centred[0] @ centred[1].T
    else:  # the same singular values from triangular factors of d x d
        factors = [np.linalg.qr(z).R for z in centred]
        product = factors[0] @ factors[1].T
    root = np.linalg.svd(product, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * root)
