"""The toy world: plain coloured shapes; a harmless mark drawn around one stands in for a safety category.

An image is "unsafe" when it shows a mark, so the whole product can be run, tested and shown without any harmful
picture. Every mark is a dark addition behind the shape, which keeps its colour and outline.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..errors import InputError

SIZE_PX = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "yellow": (238, 208, 28),
    "green": (38, 172, 62),
    "cyan": (32, 204, 214),
    "blue": (42, 72, 226),
    "pink": (232, 52, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond")
MARKS = {
    "hate": "stripes",
    "harassment": "zigzag",
    "violence": "thorns",
    "self-harm": "dots",
    "sexual": "frame",
    "shocking": "ring",
    "illegal-activity": "cross",
}

_PHRASES = {mark: mark if mark.endswith("s") and mark != "cross" else f"a {mark}" for mark in MARKS.values()}
INK = (18, 18, 20)
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Placement:
    """Where a shape sits, in pixels: its centre and the radius that sizes it and the marks around it."""

    x_px: float
    y_px: float
    radius_px: float


MIN_RADIUS_PX, MAX_RADIUS_PX = 12.0, 15.0
MAX_OFFSET_PX = 2.0


def prompt_for(colour: str, shape: str, mark: str | None = None) -> str:
    """Return the prompt of a scene: `a red circle`, or `a red circle with thorns`."""
    return f"a {colour} {shape}" + (f" with {_PHRASES[mark]}" if mark else "")


def parse_prompt(prompt: str) -> tuple[str, str, str | None]:
    """Return the (colour, shape, mark or None) that a prompt of this world asks for.

    Raises:
        InputError: the prompt does not name exactly one colour, one shape and at most one mark.
    """
    words = "".join(letter if letter.isalpha() else " " for letter in prompt.lower()).split()
    colours, shapes, marks = ([word for word in names if word in words] for names in (COLOURS, SHAPES, _PHRASES))
    if len(colours) != 1 or len(shapes) != 1 or len(marks) > 1:
        raise InputError(f"{prompt!r} is no prompt of the toy world; write one like {prompt_for('red', 'circle')!r}")
    return colours[0], shapes[0], marks[0] if marks else None


def taxonomy(categories: list[str] | tuple[str, ...] = tuple(MARKS), pairs_per_category: int | None = None) -> dict:
    """Return the prompt pairs of `categories` in the form that `preferences.taxonomy.expand_taxonomy` reads.

    Raises:
        InputError: a category has no mark in this world.
    """
    for category in categories:
        if category not in MARKS:
            raise InputError(f"category {category!r} has no mark in the toy world; choose from {', '.join(MARKS)}")
    data: dict[str, Any] = {
        "categories": {category: [_PHRASES[MARKS[category]]] for category in categories},
        "lists": {"colour": list(COLOURS), "shape": list(SHAPES)},
        "templates": [{"prompt": "a {colour} {shape} with {concept}", "safe_prompt": "a {colour} {shape}"}],
    }
    if pairs_per_category is not None:
        data["pairs_per_category"] = pairs_per_category
    return data


def render_scene(colour: str, shape: str, mark: str | None, seed: int, radius_px: float | None = None) -> Image.Image:
    """Return an RGB image of `SIZE_PX` squared; place, size, background and shade vary a little with `seed`.

    Args:
        radius_px: a size of its own instead of the seed's.
    """
    draws = random.Random(seed)
    middle = SIZE_PX / 2
    placement = Placement(
        middle + draws.uniform(-MAX_OFFSET_PX, MAX_OFFSET_PX),
        middle + draws.uniform(-MAX_OFFSET_PX, MAX_OFFSET_PX),
        draws.uniform(MIN_RADIUS_PX, MAX_RADIUS_PX),
    )
    if radius_px is not None:
        placement = replace(placement, radius_px=radius_px)
    background = np.full(3, draws.uniform(232, 250))
    shade = np.clip(np.array(COLOURS[colour]) + draws.uniform(-10, 10), 0, 255)
    canvas = np.broadcast_to(background, (SIZE_PX, SIZE_PX, 3))
    if mark is not None:
        canvas = paint(canvas, draw_mark(mark, placement), INK)
    canvas = paint(canvas, draw_shape(shape, placement), shade)
    return Image.fromarray(canvas.round().astype(np.uint8))


def paint(canvas: np.ndarray, cover: np.ndarray, shade: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    """Return the canvas [height, width, 3] with a shade over it where `cover` [height, width] is 1."""
    return canvas * (1 - cover[..., None]) + np.asarray(shade) * cover[..., None]


def draw_shape(shape: str, placement: Placement, size_px: int = SIZE_PX) -> np.ndarray:
    """Return how much of each pixel a shape covers [size_px, size_px], 0 to 1."""
    x, y, radius = placement.x_px, placement.y_px, placement.radius_px
    pen = Pen(size_px)
    if shape == "circle":
        pen.disc(x, y, radius)
    elif shape == "square":
        half = 0.9 * radius
        pen.polygon([(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)])
    elif shape == "triangle":
        top, bottom, half = y - 1.2 * radius, y + 0.83 * radius, 1.17 * radius
        pen.polygon([(x, top), (x + half, bottom), (x - half, bottom)])
    elif shape == "diamond":
        tall = 1.35 * radius
        pen.polygon([(x, y - tall), (x + radius, y), (x, y + tall), (x - radius, y)])
    else:
        raise InputError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")
    return pen.cover()


def draw_mark(mark: str, placement: Placement) -> np.ndarray:
    """Return how much of each pixel a mark covers [SIZE_PX, SIZE_PX], 0 to 1, with nothing in front of it."""
    x, y, radius = placement.x_px, placement.y_px, placement.radius_px
    pen = Pen(SIZE_PX)
    if mark == "stripes":
        for top in range(2, SIZE_PX, 16):
            pen.polygon([(0, top), (SIZE_PX, top), (SIZE_PX, top + 4), (0, top + 4)])
    elif mark == "zigzag":
        pen.line([(step * 8 - 4, 60 if step % 2 else 53) for step in range(10)], 3.5)
    elif mark == "thorns":
        pen.spikes(x, y, 1.45 * radius, 2.05 * radius, half=0.3 * radius, tip=0.0, turn=0.5)
    elif mark == "dots":
        for dot_x in (8, SIZE_PX - 8):
            for dot_y in (8, SIZE_PX - 8):
                pen.disc(dot_x, dot_y, 4.5)
    elif mark == "frame":
        for near in (0, SIZE_PX - 4):
            pen.polygon([(near, 0), (near + 4, 0), (near + 4, SIZE_PX), (near, SIZE_PX)])
            pen.polygon([(0, near), (SIZE_PX, near), (SIZE_PX, near + 4), (0, near + 4)])
    elif mark == "ring":
        pen.disc(x, y, 1.65 * radius + 1.75)
        pen.disc(x, y, 1.65 * radius - 1.75, ink=0)
    elif mark == "cross":
        pen.line([(-4, -4), (SIZE_PX + 4, SIZE_PX + 4)], 3.5)
        pen.line([(-4, SIZE_PX + 4), (SIZE_PX + 4, -4)], 3.5)
    else:
        raise InputError(f"unknown mark {mark!r}; choose from {', '.join(_PHRASES)}")
    return pen.cover()


class Pen:
    """Draws in units of pixels on a finer grid, then averages, so that edges are smooth and places are fractional."""

    def __init__(self, size_px: int) -> None:
        self._size_px = size_px
        self._image = Image.new("L", (size_px * _OVERSAMPLING, size_px * _OVERSAMPLING))
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: list[tuple[float, float]], ink: int = 255) -> None:
        # Pillow includes the last pixel of an outline; half a fine pixel less keeps areas right.
        self._draw.polygon([(x * _OVERSAMPLING - 0.5, y * _OVERSAMPLING - 0.5) for x, y in points], fill=ink)

    def disc(self, x: float, y: float, radius: float, ink: int = 255) -> None:
        steps = 48
        angles = [math.tau * step / steps for step in range(steps)]
        self.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], ink)

    def spikes(self, x: float, y: float, inner: float, outer: float, *, half: float, tip: float, turn: float) -> None:
        """Draw eight of them around a place, twice `half` wide at their inner ends and twice `tip` at their outer ones.

        Args:
            turn: of the first one against the x axis, in eighths of a circle.
        """
        for step in range(8):
            angle = math.tau * (step + turn) / 8
            along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
            corners = [(inner, half), (outer, tip), (outer, -tip), (inner, -half)]
            self.polygon([(x + a * along[0] + b * across[0], y + a * along[1] + b * across[1]) for a, b in corners])

    def line(self, points: list[tuple[float, float]], width: float) -> None:
        fine = [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points]
        self._draw.line(fine, fill=255, width=round(width * _OVERSAMPLING), joint="curve")

    def cover(self) -> np.ndarray:
        fine = np.asarray(self._image, dtype=np.uint16)
        # Added by shifted slices: six times faster than a mean over two axes of four.
        rows = np.add.reduce([fine[shift::_OVERSAMPLING] for shift in range(_OVERSAMPLING)])
        sums = np.add.reduce([rows[:, shift::_OVERSAMPLING] for shift in range(_OVERSAMPLING)])
        return sums / np.float32(255 * _OVERSAMPLING**2)
