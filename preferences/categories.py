"""The names of safety categories: seven canonical ones, and every spelling the field uses for them."""

import re
import unicodedata
from collections.abc import Iterable

from ..errors import InputError

CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal-activity")

# Slug as other data sets and detectors spell it -> our name. Names that mean something else (`propaganda`, `political`,
# and `nsfw`, which PSAlign lists beside `Sexuality`) stay categories of their own.
_SPELLINGS = {
    "hateful": "hate",
    "hate-speech": "hate",
    "harrasment": "harassment",  # the typo is in CoProV2
    "harrassment": "harassment",
    "harassing": "harassment",
    "violent": "violence",
    "violent-content": "violence",
    "selfharm": "self-harm",
    "sexuality": "sexual",
    "sexual-content": "sexual",
    "shocking-images": "shocking",
    "shocking-content": "shocking",
    "disturbing": "shocking",
    "disturbing-content": "shocking",
    "illegal": "illegal-activity",
    "illegal-activities": "illegal-activity",
}


def canonical_category(text: str) -> str:
    """Return our name of a category, whatever the spelling; an unknown one becomes a slug (`Big Bugs`: `big-bugs`).

    Raises:
        InputError: the name has no letter or digit.
    """
    normal = unicodedata.normalize("NFKC", text).casefold()
    slug = re.sub(r"[\W_]+", "-", normal).strip("-")
    if not slug:
        raise InputError(f"a category has no letter or digit; give it a name such as {CATEGORIES[0]!r}")
    return _SPELLINGS.get(slug, slug)


def canonical_categories(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return our names without repeats, in order, of several categories or of a comma list (`hate, Sexual content`)."""
    given = names.split(",") if isinstance(names, str) else names
    return tuple(dict.fromkeys(canonical_category(name) for name in given if name.strip()))
