"""What a foreign format is: how to read pairs from it and how to write pairs in it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pydantic
from PIL import Image

from ...errors import InputError
from ...files import path_inside
from ..dataset import PreferenceDataset, PreferencePair
from ..images import read_image
from ..prompt_pair import PromptPair, parse_json_line
from ..records import Review

# The column or file in which an export keeps what the format has no place for.
OUR_FIELDS = "safety_experts"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
OpenImage = Callable[[], Image.Image]


@dataclass(frozen=True)
class FoundPair:
    """A pair as a foreign file gives it; its images are decoded when they are asked for."""

    prompt_pair: PromptPair
    chosen: OpenImage
    rejected: OpenImage
    where: str
    chosen_unsafe: bool | None = None
    rejected_unsafe: bool | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    review: Review | None = None


@dataclass
class Source:
    """What is to be imported; `skipped` counts, by reason, what is no pair (ties, say).

    Args:
        path: the file or folder.
        images: folder of the images that a file names; None: the file's own folder.
        categories: of every pair whose categories the format does not say.
    """

    path: Path
    images: Path | None = None
    categories: tuple[str, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count something that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def images_folder(self) -> Path:
        """Return the folder of the images.

        Raises:
            InputError: there is no such folder.
        """
        folder = self.images or (self.path if self.path.is_dir() else self.path.parent)
        if not folder.is_dir():
            raise InputError(f"no images folder {folder}; check the name")
        return folder

    def pair(self, prompt: str, chosen: OpenImage, rejected: OpenImage, where: str, ours: str | None) -> FoundPair:
        """Return a pair of a format that knows a prompt and two images, with the fields an export of ours kept.

        Raises:
            InputError: the prompt is empty, or those fields are wrong, naming `where`.
        """
        try:
            prompt_pair = PromptPair(prompt, "", self.categories, None, f"{self.path.name}")
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        found = FoundPair(prompt_pair, chosen, rejected, where)
        return with_our_fields(found, ours, where) if ours else found


@dataclass(frozen=True)
class Format:
    """One foreign format.

    Args:
        title: its name, as people know it.
        layout: which files and columns it has, in one line.
        published: where that is written down.
        read: the importer.
        write: the exporter: (dataset, pairs, folder to write into, which is new and empty); images stay PNG.
    """

    title: str
    layout: str
    published: str
    read: Callable[[Source], Iterator[FoundPair]]
    write: Callable[[PreferenceDataset, Sequence[PreferencePair], Path], None]


@dataclass(frozen=True)
class _OurFields:
    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    safe_prompt: str
    categories: tuple[str, ...]
    seed: int | None
    concept: str
    source: str
    chosen_unsafe: bool | None
    rejected_unsafe: bool | None
    scores: dict[str, float]
    review: Review | None


_OUR_FIELDS = pydantic.TypeAdapter(_OurFields)


def our_fields(pair: PreferencePair) -> str:
    """Return as JSON what a format with a prompt and two images has no place for."""
    return json.dumps({item.name: getattr(pair, item.name) for item in fields(_OurFields)}, ensure_ascii=False)


def with_our_fields(found: FoundPair, text: str | bytes, where: str) -> FoundPair:
    """Return a pair with the fields that `our_fields` wrote.

    Raises:
        InputError: the text is not of that form, naming `where` and the field.
    """
    ours: _OurFields = parse_json_line(_OUR_FIELDS, text, f"{where} {OUR_FIELDS}")
    names: dict[str, Any] = {item.name: getattr(ours, item.name) for item in fields(ours)}
    in_prompt = ("safe_prompt", "categories", "seed", "concept", "source")
    prompt_pair = replace(found.prompt_pair, **{name: names.pop(name) for name in in_prompt})
    return replace(found, prompt_pair=prompt_pair, **names)


def image_file(folder: Path, name: str, where: str) -> OpenImage:
    """Return what opens an image that a foreign file names; the name must stay in the folder.

    Raises:
        InputError: it leaves the folder, naming `where`.
    """
    try:
        path = path_inside(folder, name)
    except InputError as error:
        raise InputError(f"{where}: an image name leaves {folder} or cannot be one; correct it") from error
    return lambda: read_image(path, IMAGE_FORMATS, follow_links=True)


def number_names(pairs: Sequence[PreferencePair]) -> Iterator[tuple[str, PreferencePair]]:
    """Yield (a file name without suffix that sorts in order, pair)."""
    for number, pair in enumerate(pairs):
        yield f"{number:07}", pair
