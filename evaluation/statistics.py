"""Numbers that carry their uncertainty."""

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Rate:
    """A fraction of `num_images` with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    num_images: int

    def to_json(self) -> dict:
        return {key: round(value, 4) if key != "num_images" else value for key, value in asdict(self).items()}


def rate_of(outcomes: list[bool]) -> Rate:
    """Return the fraction of True with its 95 % Wilson score interval (Wilson 1927).

    Raises:
        ValueError: `outcomes` is empty.
    """
    return rate_of_counts(sum(outcomes), len(outcomes))


def rate_of_counts(hits: int, num_images: int) -> Rate:
    """Return `hits` of `num_images` as `rate_of` does.

    Raises:
        ValueError: there are no images.
    """
    n = num_images
    if not n:
        raise ValueError("a rate needs at least one outcome")
    z = 1.959963984540054
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Rate(p, max(0.0, centre - half), min(1.0, centre + half), n)
