"""Reading one image file: every mode becomes RGB in a way that is said (docs/datasets.md), or is refused by name."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from ..files import open_plain

_BACKGROUND = (255, 255, 255)
_REFUSED = "convert it to RGB with its colour profile, or remove its pair"


def read_image(path: Path, formats: tuple[str, ...] = ("PNG",), *, follow_links: bool = False) -> Image.Image:
    """Read a whole image as RGB, 8 bits a channel, turned as its EXIF orientation says.

    Args:
        follow_links: for images outside a dataset, which the user named.

    Raises:
        InputError: the file is missing, truncated, a link, of none of the formats, or of a mode that is refused.
    """
    try:
        with open_plain(path, follow_links=follow_links) as file:
            return _decode(file, str(path), formats)
    except FileNotFoundError:
        raise InputError(f"{path}: the image is missing; put it back, or remove its pair") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from None


def read_image_bytes(data: bytes, where: str, formats: tuple[str, ...]) -> Image.Image:
    """Read an image that stands in a table, as `read_image` does; `where` names it in errors."""
    return _decode(io.BytesIO(data), where, formats)


def _decode(file: BinaryIO, where: str, formats: tuple[str, ...]) -> Image.Image:
    try:
        with Image.open(file, formats=formats) as image:
            return to_rgb(image)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception:  # Pillow lets every kind through: OSError, SyntaxError, struct.error, zlib.error, …
        wanted = " or ".join(formats)
        raise InputError(f"{where}: not a whole {wanted} image; replace it, or remove its pair") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB: 16-bit grey scaled, palettes looked up, transparency laid on white, turned.

    Raises:
        InputError: it has several frames, or a mode whose colours need a profile or a range that the file does not say.
    """
    if (num_frames := getattr(image, "n_frames", 1)) > 1:
        raise InputError(f"has {num_frames} frames; save the one that is meant as a still image")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in (None, "PNG")):
        values = np.asarray(image, dtype=np.int64)
        # 65535 -> 255 exactly; Pillow's own conversion cuts everything above 255 off.
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode in ("1", "L", "P", "RGB", "LA", "La", "PA", "RGBA", "RGBa", "RGBX"):
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            coloured = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (*_BACKGROUND, 255)), coloured).convert("RGB")
        return image.convert("RGB")
    raise InputError(f"mode {image.mode} is not read: {_REFUSED}")
