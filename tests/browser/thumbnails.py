"""A workflow's picture in ComfyUI's template browser: its number and name, for which models, and its steps in colour.

A picture of the graph itself cannot be read at that size (300 pixels on a screen of 1366).
"""

from pathlib import Path

from layouts import COLOURS, Layout
from PIL import Image, ImageDraw, ImageFont

SIZE_PX, MARGIN_PX = 512, 34
PAPER, TEXT, QUIET = "#1d1f24", "#f2f2f2", "#a9adb5"
VARIANTS = {
    "_sdxl": "SDXL family",
    "_z_image": "separate files, here Z-Image",
    "_toy": "toy checkpoint, on a CPU",
    ".app": "as an app",
}


def save_thumbnail(name: str, layout: Layout, path: Path) -> None:
    """Draw the picture of a workflow called like `0_make_my_model_safer_sdxl`."""
    ending = next((ending for ending in VARIANTS if name.endswith(ending)), "")
    number, _, words = name.removesuffix(ending).partition("_")
    groups = [*layout.above, *layout.below]
    card = Image.new("RGB", (SIZE_PX, SIZE_PX), PAPER)
    draw = ImageDraw.Draw(card)
    draw.text((MARGIN_PX, 20), number, TEXT, ImageFont.load_default(88))
    left = MARGIN_PX + 80
    title = words.replace("_", " ").capitalize()
    draw.text((left, 36), title, TEXT, _font_that_fits(draw, title, 34, SIZE_PX - MARGIN_PX - left))
    draw.text((left, 84), VARIANTS.get(ending, ""), QUIET, ImageFont.load_default(22))
    top, columns = 136, 1 if len(groups) <= 7 else 2
    rows = -(-len(groups) // columns)
    width = (SIZE_PX - 2 * MARGIN_PX - (columns - 1) * 14) // columns
    height = min((SIZE_PX - top - MARGIN_PX) // rows, 84)
    for place, group in enumerate(groups):
        column, row = divmod(place, rows)
        x, y = MARGIN_PX + column * (width + 14), top + row * height
        draw.rounded_rectangle((x, y, x + width, y + height - 10), 12, COLOURS[group.step][0])
        text = group.title.partition(":")[0]
        font = _font_that_fits(draw, text, 24, width - 28)
        draw.text((x + 14, y + (height - 10) / 2), text, "white", font, anchor="lm")
    card.save(path, quality=88)


def _font_that_fits(
    draw: ImageDraw.ImageDraw, text: str, size: int, width: int
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    while draw.textlength(text, ImageFont.load_default(size)) > width:
        size -= 1
    return ImageFont.load_default(size)
