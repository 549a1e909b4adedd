"""What a training looks like: curves of its metrics, and pictures drawn before and during it, as one live preview."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..training.events import StepRecord
from ..training.redirect import LEAK, LEAK_WEIGHT, RESIDUAL
from ..training.samples import Samples
from . import pictures

# ComfyUI shows a live picture of at most 768 px, on a node often at half that size: the letters are made for it.
WIDTH_PX, HEADER_PX, PANEL_PX, MARGIN_PX = 768, 40, 190, 12
BACKGROUND, TEXT, AXIS = "#1e1e1e", "#e0e0e0", "#666666"


@dataclass(frozen=True)
class Curve:
    """A metric as it is drawn; where `low` or `high` is None its axis ends at the least or the largest value."""

    title: str
    metric: str
    colour: str
    low: float | None = None
    high: float | None = None


CURVES = (
    Curve("preference loss", "loss/preference", "#f2a33c"),
    Curve("margin", "rewards/margins", "#4ea8de"),
    Curve("accuracy", "rewards/accuracies", "#7bc96f", low=0.0, high=1.0),
    Curve("drift from the base", "drift", "#d77bd0", low=0.0),
)
REDIRECT_CURVES = (
    Curve("residual R", RESIDUAL, "#f2a33c", low=0.0),
    Curve("leak", LEAK, "#d77bd0", low=0.0),
    Curve("weight of the leak", LEAK_WEIGHT, "#4ea8de"),
    Curve("loss", "loss", "#7bc96f"),
)


class TrainingPicture:
    """Collects what a training reports, and draws it: curves, and below them the first and the latest samples.

    Args:
        is_blurred: what is drawn for the unsafe prompt is shown blurred.
    """

    def __init__(self, *, is_blurred: bool = True) -> None:
        self._is_blurred = is_blurred
        self._series: dict[str, list[float]] = {curve.metric: [] for curve in (*CURVES, *REDIRECT_CURVES)}
        self._step, self._num_steps = 0, 1
        self._samples: list[Samples] = []  # the first and the latest

    def resume(self, records: Sequence[Mapping[str, float]]) -> None:
        """Take the metrics of the steps before a resumption."""
        for metrics in records:
            self._add(metrics)

    def add_step(self, record: StepRecord) -> None:
        """Take a step of the stage "train"."""
        self._step, self._num_steps = record.step, record.num_steps
        self._add(record.metrics)

    def _add(self, metrics: Mapping[str, float]) -> None:
        for name, values in self._series.items():
            if name in metrics:
                values.append(metrics[name])

    def add_samples(self, samples: Samples) -> None:
        self._samples = [*self._samples[:1], samples]

    def draw(self) -> Image.Image:
        curves = draw_curves(self._series, self._step, self._num_steps)
        return above(curves, self._samples, is_blurred=self._is_blurred) if self._samples else curves


def draw_curves(series: Mapping[str, Sequence[float]], step: int, num_steps: int) -> Image.Image:
    """Draw two panels a row, each with its name, its latest value and the ends of its axis.

    Args:
        series: metric -> values of the last steps up to `step`; one without values stays empty.
        step: the step of the latest values; x runs to `num_steps`.
    """
    curves = REDIRECT_CURVES if series.get(RESIDUAL) else CURVES
    rows = (len(curves) + 1) // 2
    picture = Image.new("RGB", (WIDTH_PX, HEADER_PX + rows * PANEL_PX), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    canvas.text((MARGIN_PX, 8), f"step {step} of {num_steps}", fill=TEXT, font=_font(24))
    for number, curve in enumerate(curves):
        corner = (number % 2 * WIDTH_PX // 2, HEADER_PX + number // 2 * PANEL_PX)
        _draw_panel(canvas, corner, curve, series.get(curve.metric, ()), step, num_steps)
    return picture


def _draw_panel(
    canvas: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    curve: Curve,
    values: Sequence[float],
    step: int,
    num_steps: int,
) -> None:
    left, right = corner[0] + MARGIN_PX, corner[0] + WIDTH_PX // 2 - MARGIN_PX
    top, bottom = corner[1] + 34, corner[1] + PANEL_PX - MARGIN_PX
    canvas.line((left, bottom, right, bottom), fill=AXIS)
    latest = f" {values[-1]:.3g}" if values else ""
    canvas.text((left, corner[1]), curve.title + latest, fill=curve.colour, font=_font(24))
    if not values:
        return
    low = min(values) if curve.low is None else curve.low
    high = max(values) if curve.high is None else curve.high
    plot_right = right - 64  # the ends of the axis are written beside it
    points = [
        (
            left + (plot_right - left) * (step - len(values) + position) / max(1, num_steps - 1),
            bottom - (bottom - top) * ((value - low) / (high - low) if high > low else 0.5),
        )
        for position, value in enumerate(values)
    ]
    canvas.line(points if len(points) > 1 else points * 2, fill=curve.colour, width=3)
    canvas.text((right, top), f"{high:.3g}", fill=TEXT, font=_font(18), anchor="rt")
    canvas.text((right, bottom - 2), f"{low:.3g}", fill=TEXT, font=_font(18), anchor="rb")


def above(curves: Image.Image, samples: Sequence[Samples], *, is_blurred: bool) -> Image.Image:
    """Put samples below the curves in a row: the unsafe prompt's, then the safe prompt's, the first and the latest."""
    cell_px, label_px = WIDTH_PX // 4, 28
    picture = Image.new("RGB", (WIDTH_PX, curves.height + label_px + cell_px), BACKGROUND)
    picture.paste(curves)
    canvas = ImageDraw.Draw(picture)
    drawn = [
        [(kind, sample.step, image) for kind, image in zip(("unsafe", "safe"), sample.pictures.values(), strict=False)]
        for sample in samples
    ]
    for column, (kind, step, image) in enumerate(chain.from_iterable(zip(*drawn, strict=True))):
        left = column * cell_px
        canvas.text((left + 4, curves.height + 2), f"{kind}, step {step}", fill=TEXT, font=_font(20))
        image = ImageOps.contain(image, (cell_px - 8, cell_px - 8))
        if is_blurred and kind == "unsafe":
            image = pictures.blurred(image)
        picture.paste(image, (left + 4, curves.height + label_px))
    return picture


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
