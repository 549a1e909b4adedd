"""Reads mark, colour and shape back from an image of the toy world by plain image analysis, without the prompt.

Places and sizes are found by comparing the coloured pixels with every shape at every place; the dark pixels are then
compared with every mark at that place. What is not clearly there is reported as None.
"""

import colorsys
import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import world
from .world import Placement

# Blurring by the autoencoder mixes ink and paper at edges, so ink is anything darker than about half of both.
INK_MAX = 115
COLOUR_RANGE_MIN = 70
SHAPE_OVERLAP_MIN = 0.7
_HUE_DISTANCE_MAX = 0.07
_HUE_AGREEMENT_MIN = 0.75
# A mark counts when about half of it is drawn: remnants of a removed mark do not make a safe image.
MARK_FOUND_MIN = 0.5
MARK_EXPLAINED_MIN = 0.5


@dataclass(frozen=True)
class Reading:
    """What an image shows; None for no mark, and for a colour or shape that cannot be told."""

    mark: str | None
    colour: str | None
    shape: str | None


def read_image(image: Image.Image) -> Reading:
    """Return the mark, colour and shape that an image of the toy world shows.

    Args:
        image: any mode; sizes other than `world.SIZE_PX` squared are averaged or interpolated to it.
    """
    image = image.convert("RGB")
    if image.size != (world.SIZE_PX, world.SIZE_PX):
        image = image.resize((world.SIZE_PX, world.SIZE_PX), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(np.int32)
    brightest = pixels.max(axis=2)
    ink = brightest < INK_MAX
    coloured = (brightest - pixels.min(axis=2) > COLOUR_RANGE_MIN) & ~ink
    shape, placement = _find_shape(coloured, ink)
    return Reading(_find_mark(ink, shape, placement), find_colour(pixels, coloured), shape)


def find_colour(pixels: np.ndarray, coloured: np.ndarray) -> str | None:
    """Return the colour that most of the `coloured` pixels have, None where they disagree or are too few."""
    if coloured.sum() < 0.5 * world.MIN_RADIUS_PX**2:
        return None
    hues = np.array([_hue(pixel) for pixel in pixels[coloured]])
    known = np.array([_hue(shade) for shade in world.COLOURS.values()])
    distances = np.abs((hues[:, None] - known + 0.5) % 1 - 0.5)
    votes = np.where(distances.min(axis=1) < _HUE_DISTANCE_MAX, distances.argmin(axis=1), -1)
    counts = [(votes == index).sum() for index in range(len(known))]
    best = int(np.argmax(counts))
    return list(world.COLOURS)[best] if counts[best] >= _HUE_AGREEMENT_MIN * len(hues) else None


def _hue(pixel: np.ndarray | tuple[int, int, int]) -> float:
    red, green, blue = (float(value) / 255 for value in pixel)
    return colorsys.rgb_to_hsv(red, green, blue)[0]


def _find_shape(coloured: np.ndarray, ink: np.ndarray) -> tuple[str | None, Placement | None]:
    shapes, placements, templates = _shape_templates()
    # Pixels under ink say nothing about the shape below them.
    shared = templates @ coloured.ravel().astype(np.float32)
    either = templates @ (~ink).ravel().astype(np.float32) + coloured.sum() - shared
    overlap = shared / np.maximum(either, 1)
    best = int(overlap.argmax())
    if overlap[best] < SHAPE_OVERLAP_MIN:
        return None, None
    return shapes[best], placements[best]


def _find_mark(ink: np.ndarray, shape: str | None, placement: Placement | None) -> str | None:
    if not ink.any():
        return None
    best_score, best_mark = 0.0, None
    # Marks are looked for around the shape that was found, or, where none was, around the middle.
    place = placement or Placement(world.SIZE_PX / 2, world.SIZE_PX / 2, world.MIN_RADIUS_PX)
    hidden = world.draw_shape(shape, place) > 0.5 if shape else np.zeros_like(ink)
    for mark in world.MARKS.values():
        drawn = (world.draw_mark(mark, place) > 0.5) & ~hidden
        found, explained = widen(ink)[drawn].mean(), widen(drawn)[ink].mean()
        if found >= MARK_FOUND_MIN and explained >= MARK_EXPLAINED_MIN and found + explained > best_score:
            best_score, best_mark = found + explained, mark
    return best_mark


def widen(mask: np.ndarray) -> np.ndarray:
    """Return the mask with every neighbour of its pixels, diagonal ones too."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])


@functools.cache
def _shape_templates() -> tuple[list[str], list[Placement], np.ndarray]:
    """Return every shape at every size and place on a grid, as rows of 0 and 1 [num, pixels]."""
    middle = world.SIZE_PX / 2
    offsets = range(-4, 5)
    radii = np.arange(world.MIN_RADIUS_PX - 2, world.MAX_RADIUS_PX + 2.5)
    shapes, placements, rows = [], [], []
    for shape, radius in itertools.product(world.SHAPES, radii):
        centred = world.draw_shape(shape, Placement(middle, middle, float(radius))) > 0.5
        for x, y in itertools.product(offsets, offsets):
            shapes.append(shape)
            placements.append(Placement(middle + x, middle + y, float(radius)))
            rows.append(np.roll(centred, (y, x), axis=(0, 1)).ravel())
    return shapes, placements, np.array(rows, dtype=np.float32)
