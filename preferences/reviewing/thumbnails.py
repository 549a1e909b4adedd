"""Small pictures of a dataset's images, made once and kept in its `.cache`; and veils, which show no detail."""

import hashlib
import io
import os
from pathlib import Path

from PIL import Image

from ...errors import SafetyExpertsError
from ...files import path_inside, write_atomically
from ..images import read_image

FORMATS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
_THUMBNAIL_PX = 320
_VEIL_PX = 10


def read_thumbnail(folder: Path, image: Path) -> bytes:
    """Return a JPEG of an image of the dataset `folder`, at most 320 px wide and high.

    It is made once; where the folder cannot be written to, every time.

    Raises:
        InputError: the image is missing or broken, or `.cache` is a link that leads out of the folder.
    """
    stat = image.stat() if image.exists() else os.stat_result([0] * 10)  # missing: read_image says so
    key = f"{image.relative_to(folder.resolve()).as_posix()}\0{stat.st_mtime_ns}\0{stat.st_size}"
    kept = path_inside(folder, f".cache/thumbnails/{hashlib.sha256(key.encode()).hexdigest()[:32]}.jpg")
    try:
        return kept.read_bytes()
    except OSError:
        pass
    small = read_image(image, tuple(FORMATS))
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), reducing_gap=3.0)
    encoded = _encode(small, "JPEG", quality=85)
    try:
        with write_atomically(kept) as temporary:
            temporary.write_bytes(encoded)
    except SafetyExpertsError:
        pass  # a folder one may only read is reviewed all the same
    return encoded


def make_veil(thumbnail: bytes) -> bytes:
    """Return a PNG of 10 px: enough for the eye to see that there is a picture, too little to see what it shows."""
    with Image.open(io.BytesIO(thumbnail), formats=("JPEG",)) as image:
        veil = image.convert("RGB")
    veil.thumbnail((_VEIL_PX, _VEIL_PX), Image.Resampling.BOX)
    return _encode(veil, "PNG")


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
