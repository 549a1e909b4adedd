"""What a training looks like: curves of its metrics, and pictures drawn before and during it, as one live preview."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageOps

from ..training.events import StepRecord
from ..training.samples import Samples

WIDTH_PX, PANEL_PX, MARGIN_PX = 384, 128, 20
COLOURS = ("#f2a33c", "#4ea8de", "#7bc96f")
BACKGROUND, TEXT, AXIS = "#1e1e1e", "#d0d0d0", "#555555"
CURVES = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}


class TrainingPicture:
    """Collects what a training reports, and draws it: curves, and beside them the first and the latest samples."""

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = {name: [] for name in CURVES}
        self._step, self._num_steps = 0, 1
        self._samples: list[Samples] = []  # the first and the latest

    def add_step(self, record: StepRecord) -> None:
        """Take a step of the stage "train"."""
        self._step, self._num_steps = record.step, record.num_steps
        for name, metric in CURVES.items():
            if metric in record.metrics:
                self._series[name].append(record.metrics[metric])

    def add_samples(self, samples: Samples) -> None:
        self._samples = [*self._samples[:1], samples]

    def draw(self) -> Image.Image:
        series = {name: values for name, values in self._series.items() if values}
        curves = draw_curves(series, self._step, self._num_steps)
        return beside(curves, self._samples) if self._samples else curves


def draw_curves(series: Mapping[str, Sequence[float]], step: int, num_steps: int) -> Image.Image:
    """Draw one panel a series, under one another, with its name and latest value.

    Args:
        series: name -> values of the last steps up to `step`, at least one.
        step: the step of the latest values; x runs to `num_steps`.
    """
    picture = Image.new("RGB", (WIDTH_PX, PANEL_PX * len(CURVES)), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    for panel, (name, values) in enumerate(series.items()):
        top = panel * PANEL_PX
        bottom = top + PANEL_PX - MARGIN_PX // 2
        canvas.text((MARGIN_PX, top + 4), f"{name} {values[-1]:.4g}   step {step} of {num_steps}", fill=TEXT)
        canvas.line((MARGIN_PX, bottom, WIDTH_PX - MARGIN_PX, bottom), fill=AXIS)
        low, high = min(values), max(values)
        span_px, height_px = WIDTH_PX - 2 * MARGIN_PX, PANEL_PX - 2 * MARGIN_PX
        points = [
            (
                MARGIN_PX + span_px * (step - len(values) + position) / max(1, num_steps - 1),
                bottom - height_px * ((value - low) / (high - low) if high > low else 0.5),
            )
            for position, value in enumerate(values)
        ]
        canvas.line(points if len(points) > 1 else points * 2, fill=COLOURS[panel % len(COLOURS)], width=2)
    return picture


def beside(curves: Image.Image, samples: Sequence[Samples]) -> Image.Image:
    """Put samples to the right of the curves: a column a step, the unsafe prompt's picture above the safe prompt's."""
    cell_px = curves.height // 2
    side_px = cell_px - MARGIN_PX
    picture = Image.new("RGB", (curves.width + cell_px * len(samples), curves.height), BACKGROUND)
    picture.paste(curves)
    canvas = ImageDraw.Draw(picture)
    for column, drawn in enumerate(samples):
        left = curves.width + column * cell_px
        for row, image in enumerate(drawn.pictures.values()):
            kind = ("unsafe", "safe")[row]
            canvas.text((left, row * cell_px + 4), f"{kind} prompt, step {drawn.step}", fill=TEXT)
            picture.paste(ImageOps.contain(image, (side_px, side_px)), (left, row * cell_px + MARGIN_PX))
    return picture
