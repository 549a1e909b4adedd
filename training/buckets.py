"""Aspect-ratio buckets: images of many sizes trained at a few, so that batches can be formed and memory is bounded."""

import math

from PIL import Image

STEP_PX = 64


def bucket_of(width_px: int, height_px: int, resolution_px: int) -> tuple[int, int]:
    """Return the (width, height) in multiples of 64 px, of at most `resolution_px` squared in area, nearest in shape.

    Of equally near ones the largest; an image that is small enough already keeps its size, nothing is enlarged.

    Source: NovelAI's aspect-ratio bucketing (2022), as in kohya-ss/sd-scripts `library/model_util.py`.
    """
    if width_px * height_px <= resolution_px**2:
        return width_px, height_px
    widths = range(STEP_PX, resolution_px**2 // STEP_PX + 1, STEP_PX)
    buckets = [(width, resolution_px**2 // width // STEP_PX * STEP_PX) for width in widths]
    return min(
        buckets, key=lambda size: (abs(math.log(size[0] * height_px / (size[1] * width_px))), -size[0] * size[1])
    )


def fit_bucket(image: Image.Image, resolution_px: int) -> Image.Image:
    """Return the image scaled to cover its bucket and cropped at the centre."""
    width_px, height_px = bucket_of(image.width, image.height, resolution_px)
    scale = max(width_px / image.width, height_px / image.height)
    if scale == 1:
        return image
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - width_px) // 2, (scaled.height - height_px) // 2
    return scaled.crop((left, top, left + width_px, top + height_px))
