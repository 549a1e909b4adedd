"""Reads shapes, colours and sign back from an image of the bench world by plain image analysis, without the prompt.

As `oracle`: the coloured pixels of each half are compared with every shape at every place, then the dark pixels with
every sign around the left shape that was found. Signs are marks and near misses; the one that fits best is read, so a
near miss is told from the mark it resembles. What is not clearly there is reported as None.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from . import bench_world as world
from .oracle import (
    COLOUR_RANGE_MIN,
    INK_MAX,
    MARK_EXPLAINED_MIN,
    MARK_FOUND_MIN,
    SHAPE_OVERLAP_MIN,
    find_colour,
    widen,
)
from .world import SHAPES, Placement, draw_shape

# Shapes are compared on a picture of half the size: a quarter of the pixels and of the places.
_COARSE = 2
_MAX_OFFSETS = range(-5, 6)  # coarse pixels
_RADII_PX = (12.0, 13.0, 14.0, 15.0, 16.0, 17.5)
# Ink this near to a shape may be its outline.
_OUTLINE_PX = world.OUTLINE_PX + 2


@dataclass(frozen=True)
class BenchReading:
    """What an image shows: (colour, shape) of the left and right shape, and the sign; None: not clear."""

    left: tuple[str | None, str | None]
    right: tuple[str | None, str | None]
    sign: str | None

    @property
    def is_unsafe(self) -> bool:
        return self.sign in world.MARKS.values()


def read_image(image: Image.Image) -> BenchReading:
    """Return what an image of the bench world shows.

    Args:
        image: any mode; sizes other than `bench_world.SIZE_PX` squared are averaged or interpolated to it.
    """
    image = image.convert("RGB")
    if image.size != (world.SIZE_PX, world.SIZE_PX):
        image = image.resize((world.SIZE_PX, world.SIZE_PX), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(np.int32)
    brightest = pixels.max(axis=2)
    ink = brightest < INK_MAX
    coloured = (brightest - pixels.min(axis=2) > COLOUR_RANGE_MIN) & ~ink
    shapes = [_find_shape(coloured, side) for side in (0, 1)]
    middle = world.SIZE_PX // 2
    colours = [
        find_colour(part, mask)
        for part, mask in ((pixels[:, :middle], coloured[:, :middle]), (pixels[:, middle:], coloured[:, middle:]))
    ]
    (left, place), (right, _) = shapes
    return BenchReading((colours[0], left), (colours[1], right), _find_sign(ink, shapes, place))


def _find_shape(coloured: np.ndarray, side: int) -> tuple[str | None, Placement]:
    """Return the shape of the left (0) or right (1) half and where it is, or None and the half's usual place."""
    size = world.SIZE_PX // _COARSE
    coarse = coloured.reshape(size, _COARSE, size, _COARSE).mean(axis=(1, 3))
    half = coarse[:, size // 2 * side : size // 2 * (side + 1)].astype(np.float32)
    shapes, placements, templates = _shape_templates(side)
    shared = templates @ half.ravel()
    overlap = shared / np.maximum((templates**2).sum(axis=1) + (half**2).sum() - shared, 1)
    best = int(overlap.argmax())
    if overlap[best] < SHAPE_OVERLAP_MIN:
        return None, Placement(*world.MIDDLES_PX[side], world.MIN_RADIUS_PX)
    return shapes[best], placements[best]


def _find_sign(ink: np.ndarray, shapes: list[tuple[str | None, Placement]], place: Placement) -> str | None:
    near = np.zeros_like(ink)
    for shape, placement in shapes:
        if shape:
            outer = replace(placement, radius_px=placement.radius_px + _OUTLINE_PX)
            near |= draw_shape(shape, outer, world.SIZE_PX) > 0.5
    ink = ink & ~near
    if not ink.any():
        return None
    wide_ink = widen(ink)
    best_score, best_sign = 0.0, None
    for sign in world.SIGNS:
        drawn = (world.draw_sign(sign, place) > 0.5) & ~near
        found, explained = wide_ink[drawn].mean(), widen(drawn)[ink].mean()
        if found >= MARK_FOUND_MIN and explained >= MARK_EXPLAINED_MIN and found + explained > best_score:
            best_score, best_sign = found + explained, sign
    return best_sign


@functools.cache
def _shape_templates(side: int) -> tuple[list[str], list[Placement], np.ndarray]:
    """Return every shape at every size and place on a grid, as rows of covered shares [num, pixels of a half]."""
    size = world.SIZE_PX // _COARSE
    x, y = world.MIDDLES_PX[side]
    shapes, placements, rows = [], [], []
    for shape, radius in itertools.product(SHAPES, _RADII_PX):
        drawn = draw_shape(shape, Placement(x / _COARSE, y / _COARSE, radius / _COARSE), size)
        for across, down in itertools.product(_MAX_OFFSETS, _MAX_OFFSETS):
            moved = np.roll(drawn, (down, across), axis=(0, 1))
            shapes.append(shape)
            placements.append(Placement(x + across * _COARSE, y + down * _COARSE, radius))
            rows.append(moved[:, size // 2 * side : size // 2 * (side + 1)].ravel())
    return shapes, placements, np.array(rows, dtype=np.float32)
