"""KID, CMMD and the Frechet distance on Gaussians with known answers, and against plain sums over pairs."""

import itertools
import math

import numpy as np
import pytest
from safety_experts.evaluation.distances import cmmd, frechet, gaussian_kernel, kid, paired_mmd, polynomial_kernel

linalg = pytest.importorskip("scipy.linalg")


def _normal(seed, n, d, mean=0.0, spread=1.0):
    return mean + spread * np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel])
def test_the_squared_mmd_is_the_sum_over_pairs_of_prompts(kernel):
    x, y = _normal(0, 7, 3), _normal(1, 7, 3, 0.5)

    def k(a, b):
        return float(kernel(a[None], b[None])[0, 0])

    pairs = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in itertools.permutations(range(7), 2)
    ]
    assert paired_mmd(x, y, kernel).value == pytest.approx(np.mean(pairs))


def test_the_kernels_are_those_of_the_papers():
    x, y = np.array([[1.0, 2.0]]), np.array([[0.5, -1.0]])
    assert polynomial_kernel(x, y)[0, 0] == pytest.approx(((0.5 - 2.0) / 2 + 1) ** 3)
    assert gaussian_kernel(x, y)[0, 0] == pytest.approx(math.exp(-(0.25 + 9) / 200))


def test_the_kernels_are_scikit_learns():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    x, y = _normal(0, 5, 7), _normal(1, 6, 7)
    assert polynomial_kernel(x, y) == pytest.approx(pairwise.polynomial_kernel(x, y, degree=3, gamma=1 / 7, coef0=1))
    assert gaussian_kernel(x, y) == pytest.approx(pairwise.rbf_kernel(x, y, gamma=1 / 200))


@pytest.mark.slow
def test_kid_of_normal_numbers_is_the_difference_of_their_moments():
    # In one dimension (xy + 1)³ = Σ C(3,k) (xy)^k, so the squared MMD is Σ C(3,k) (E x^k − E y^k)².
    mean, spread = 0.4, 1.3
    moments = [(0.0, mean), (1.0, mean**2 + spread**2), (0.0, mean**3 + 3 * mean * spread**2)]
    expected = sum(c * (a - b) ** 2 for c, (a, b) in zip((3, 3, 1), moments, strict=True))
    found = kid(_normal(2, 4000, 1), _normal(3, 4000, 1, mean, spread))
    assert found.value == pytest.approx(expected, rel=0.1)
    assert found.low < expected < found.high


@pytest.mark.slow
def test_the_gaussian_mmd_of_normal_numbers_has_its_closed_form():
    # E k(x, y) for x ~ N(m, s² I), y ~ N(n, t² I) is (w² / (w² + s² + t²))^(d/2) exp(−|m − n|² / 2 (w² + s² + t²)).
    d, w, gap = 4, 10.0, 3.0

    def expectation(distance):
        total = w * w + 2
        return (w * w / total) ** (d / 2) * math.exp(-distance / (2 * total))

    expected = 2 * expectation(0) - 2 * expectation(d * gap**2)
    found = paired_mmd(_normal(4, 1500, d), _normal(5, 1500, d, gap), gaussian_kernel)
    assert found.value == pytest.approx(expected, rel=0.05)


def test_equal_distributions_are_at_zero_on_average_and_paired_pictures_too():
    # Of nine prompts, which a biased estimate would call far apart.
    independent = [kid(_normal(n, 9, 8), _normal(1000 + n, 9, 8)).value for n in range(200)]
    # Both pictures of a prompt share most of what they are.
    paired = []
    for n in range(200):
        prompt = _normal(n, 9, 8)
        x, y = (0.9 * prompt + math.sqrt(1 - 0.81) * _normal(5000 + 2 * n + side, 9, 8) for side in (0, 1))
        paired.append(cmmd(x, y).value)
    for values in (independent, paired):
        assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)
        assert min(values) < 0


def test_cmmd_does_not_see_the_length_of_vectors():
    x, y = _normal(0, 20, 6), _normal(1, 20, 6)
    assert cmmd(3 * x, 0.1 * y).value == pytest.approx(cmmd(x, y).value)


@pytest.mark.parametrize(("n", "d"), [(4000, 3), (40, 64)])
def test_frechet_is_scipys_root_of_the_product(n, d):
    x, y = _normal(0, n, d), _normal(1, n, d, 0.5, 2.0)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(linalg.sqrtm(first @ second + 1e-12 * np.eye(d)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-3)


def test_frechet_of_normal_numbers_is_what_the_formula_says():
    d, gap, spread = 3, 0.7, 1.8
    found = frechet(_normal(6, 100_000, d), _normal(7, 100_000, d, gap, spread))
    assert found == pytest.approx(d * gap**2 + d * (1 - spread) ** 2, rel=0.03)


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="two or more"):
        kid(np.zeros((1, 3)), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="same shape"):
        kid(np.zeros((4, 3)), np.zeros((5, 3)))
