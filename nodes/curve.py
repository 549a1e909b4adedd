"""A small line chart as a picture, for the live preview of a training node."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

WIDTH_PX, PANEL_PX, MARGIN_PX = 384, 128, 20
COLOURS = ("#f2a33c", "#4ea8de", "#7bc96f")
BACKGROUND, TEXT, AXIS = "#1e1e1e", "#d0d0d0", "#555555"


def draw_curves(series: Mapping[str, Sequence[float]], step: int, num_steps: int) -> Image.Image:
    """Draw one panel a series, under one another, with its name and latest value.

    Args:
        series: name -> values of the last steps up to `step`, at least one.
        step: the step of the latest values; x runs to `num_steps`.
    """
    picture = Image.new("RGB", (WIDTH_PX, PANEL_PX * len(series)), BACKGROUND)
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
