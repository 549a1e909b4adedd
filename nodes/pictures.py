"""Pictures of pairs as nodes show them: what may be unsafe is blurred, unless the user wants to see it."""

from PIL import Image, ImageFilter


def blurred(picture: Image.Image) -> Image.Image:
    """Return a picture of which only the colours can be told."""
    return picture.filter(ImageFilter.GaussianBlur(picture.width / 12))


def side_by_side(rejected: Image.Image, chosen: Image.Image, *, is_blurred: bool) -> Image.Image:
    """Return the unsafe picture left and the safe one right of it."""
    if is_blurred:
        rejected = blurred(rejected)
    together = Image.new("RGB", (rejected.width + chosen.width, max(rejected.height, chosen.height)))
    together.paste(rejected, (0, 0))
    together.paste(chosen, (rejected.width, 0))
    return together
