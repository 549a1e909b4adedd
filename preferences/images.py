"""Reading one image file, with an error a user can act on."""

from pathlib import Path

from PIL import Image

from ..errors import InputError


def read_image(path: Path, formats: tuple[str, ...] = ("PNG",)) -> Image.Image:
    """Read a whole image as RGB.

    Raises:
        InputError: the file is missing, truncated, or of none of the formats.
    """
    try:
        with Image.open(path, formats=formats) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: the image is missing; put it back, or remove its pair") from None
    # Pillow raises SyntaxError and ValueError, too, for damaged PNG chunks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        wanted = " or ".join(formats)
        raise InputError(f"{path}: not a whole {wanted} image ({error}); replace it, or remove its pair") from None
