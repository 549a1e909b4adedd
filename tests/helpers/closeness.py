"""Comparing two different computations of one thing: rounding is measured by the size of the whole tensor."""

from torch import Tensor


def assert_close_at_scale(found: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """Fail where any element differs by more than `relative` times the largest element of `expected`.

    An element's own size says nothing about its rounding error, which comes from sums of larger numbers: another
    machine, thread count or instruction set adds in another order.
    """
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max())
    worst = float((found.detach() - expected.detach()).abs().max())
    assert worst <= relative * scale, f"differs by {worst:.2g}, {worst / scale:.2g} of the largest value {scale:.2g}"
