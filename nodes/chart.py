"""The report's dumbbell chart as a picture for the graph: before, after and their 95 % intervals, a row a bar."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..evaluation.charts import Bar

WIDTH_PX, LABEL_PX, NOTE_PX, ROW_PX, AXIS_PX = 960, 360, 70, 34, 40
BACKGROUND, TEXT, GRID = "#1e1e1e", "#e0e0e0", "#444444"
BEFORE, AFTER, NULL = "#f2a33c", "#4ea8de", "#8a8a8a"


def draw_bars(bars: Sequence[Bar]) -> Image.Image:
    """Return the chart; rings are before, discs after."""
    height = ROW_PX * max(1, len(bars)) + AXIS_PX
    image = Image.new("RGB", (WIDTH_PX, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    left, right = LABEL_PX, WIDTH_PX - NOTE_PX

    def x(value: float) -> float:
        return left + (right - left) * value

    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.line([x(tick), 6, x(tick), height - AXIS_PX + 8], fill=GRID)
        draw.text((x(tick), height - 24), f"{tick * 100:.0f} %", fill=TEXT, font=small, anchor="mm")
    for row, bar in enumerate(bars):
        y = ROW_PX * row + ROW_PX // 2 + 4
        colour = NULL if bar.is_null else AFTER
        draw.text((left - 12, y), bar.label, fill=TEXT, font=font, anchor="rm")
        draw.text((right + 10, y), bar.note, fill=TEXT, font=small, anchor="lm")
        for (_, low, high), place, ink in ((bar.before, y - 6, BEFORE), (bar.after, y + 6, colour)):
            draw.line([x(low), place, x(high), place], fill=ink, width=2)
        draw.line([x(bar.before[0]), y, x(bar.after[0]), y], fill=colour, width=3)
        for value, ink, inside in ((bar.before[0], BEFORE, BACKGROUND), (bar.after[0], colour, colour)):
            draw.ellipse([x(value) - 6, y - 6, x(value) + 6, y + 6], fill=inside, outline=ink, width=3)
    if not bars:
        draw.text((WIDTH_PX / 2, ROW_PX / 2), "nothing to compare yet", fill=TEXT, font=font, anchor="mm")
    return image


def as_image(picture: Image.Image) -> torch.Tensor:
    """Return an IMAGE [1, h, w, 3] with values in 0..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
