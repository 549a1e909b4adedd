"""What a preference dataset stores: `DatasetInfo` in dataset.json, and a `PreferencePair` a line of metadata.jsonl."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic

from ..checkpoint_id import CheckpointId
from ..errors import InputError
from ..files import open_plain, refuse_link
from ..typed import read_record
from .categories import canonical_categories
from .prompt_pair import check_seed, check_text, parse_json_line

FORMAT_VERSION = 1

Review = Literal["accepted", "flipped", "dropped"]
CHANGEABLE = ("review", "scores", "chosen_unsafe", "rejected_unsafe", "concept", "categories")

# What a dataset folder holds; none of it may be a link.
_OWN_NAMES = ("dataset.json", "metadata.jsonl", "prompt_pairs.jsonl", "images", ".lock", ".cache")

_RECORD_CONFIG = pydantic.ConfigDict(extra="forbid")
_Pixels = Annotated[int, pydantic.Field(ge=1)]


@dataclass(frozen=True)
class PreferencePair:
    """One pair of images and what is known of it (design §3).

    Args:
        prompt: the condition both images are trained under: the unsafe prompt.
        chosen_file_name: path of the chosen image, relative to the dataset folder.
        chosen_unsafe: whether the chosen image is unsafe; None where nobody judged it.
        seed: of both images; None where it is unknown.
        concept: the words of the prompt that make it unsafe; may be empty.
        scores: judge name -> number.
        review: the reviewer's verdict, or None.
    """

    __pydantic_config__: ClassVar = _RECORD_CONFIG

    id: str
    prompt: str = field(repr=False)
    safe_prompt: str = field(repr=False)
    categories: tuple[str, ...]
    chosen_file_name: str
    rejected_file_name: str
    chosen_unsafe: bool | None
    rejected_unsafe: bool | None
    seed: int | None
    width_px: _Pixels
    height_px: _Pixels
    concept: str = field(default="", repr=False)
    scores: dict[str, float] = field(default_factory=dict)
    review: Review | None = None
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", canonical_categories(self.categories))
        for name in ("id", "prompt", "chosen_file_name", "rejected_file_name"):
            if not getattr(self, name).strip():
                raise InputError(f"field {name!r} is empty; fill it in")
        for name in ("id", "prompt", "safe_prompt", "concept", "source"):
            check_text(getattr(self, name), name)
        for name in ("chosen_file_name", "rejected_file_name"):
            _check_file_name(getattr(self, name), name)
        check_seed(self.seed)
        for score in self.scores.values():
            if not math.isfinite(score):
                raise InputError(f"field 'scores': a judge gave {score}; a score is a finite number")
        if self.review is not None and self.review not in get_args(Review):
            raise InputError(f"field 'review' is none of {', '.join(get_args(Review))}; correct it")

    def swapped(self) -> "PreferencePair":
        """Return the pair with chosen and rejected exchanged, file names and flags both."""
        return dataclasses.replace(
            self,
            chosen_file_name=self.rejected_file_name,
            rejected_file_name=self.chosen_file_name,
            chosen_unsafe=self.rejected_unsafe,
            rejected_unsafe=self.chosen_unsafe,
        )

    def changed(self, fields: Mapping[str, Any]) -> "PreferencePair":
        """Return the pair with some fields changed; `scores` are added to those there are, None removes one.

        Raises:
            InputError: a field cannot be changed, or a value is not valid.
        """
        if unknown := sorted(set(fields) - set(CHANGEABLE)):
            raise InputError(f"field {unknown[0]!r} cannot be changed; only {', '.join(CHANGEABLE)} can")
        record = dataclasses.asdict(self) | dict(fields)
        if "scores" in fields:
            scores = self.scores | dict(fields["scores"])
            record["scores"] = {judge: score for judge, score in scores.items() if score is not None}
        record["categories"] = list(record["categories"])
        return parse_pair(json.dumps(record).encode(), f"pair {self.id}")

    def to_json(self, leave_out_empty_concept: bool = False) -> str:
        """Return the pair as one line of metadata.jsonl, without the line break.

        Args:
            leave_out_empty_concept: as lines were before there was this field; fingerprints are taken of that form.
        """
        record = dataclasses.asdict(self)
        if leave_out_empty_concept and not self.concept:
            del record["concept"]
        return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _check_file_name(name: str, field_name: str) -> None:
    # Both kinds of path, so that a dataset made to attack Windows is refused everywhere.
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\\" in name:
        raise InputError(f"field {field_name!r} leaves the dataset folder; use a name inside it, with /")
    first = PurePosixPath(name).parts[0].casefold() if PurePosixPath(name).parts else ""
    if first.startswith(".") or (first != "images" and first in _OWN_NAMES):
        raise InputError(f"field {field_name!r} names a file of the dataset's own, no image; use a name in images/")


@dataclass(frozen=True)
class ImageToImage:
    """The chosen image was drawn from the rejected one (DUO, arXiv 2407.21035) and not from noise alone.

    Args:
        denoise: how much of it was drawn anew: ComfyUI's KSampler's, above 0 and below 1. DUO: 0.75 or 0.8.
        negates_unsafe: the unsafe prompt was its negative prompt, as in DUO.

    Raises:
        InputError: `denoise` is outside.
    """

    __pydantic_config__: ClassVar = _RECORD_CONFIG

    denoise: float
    negates_unsafe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.denoise < 1:
            raise InputError(f"denoise {self.denoise} must be above 0 and below 1, such as 0.75")


@dataclass(frozen=True)
class DatasetInfo:
    """How all images of a dataset were made.

    Args:
        base_checkpoint: the model that drew them, also as a mapping of its fields; empty when they were not drawn here.
        sampler: its settings, as JSON values; {} likewise.
        prompt_source: where the prompts came from.
        licence_note: what the licence of prompts and images asks for.
        image_to_image: how the chosen image follows from the rejected one; None where it does not. Left out of the
            file then, as it is in files that were written before there was this field.
    """

    __pydantic_config__: ClassVar = _RECORD_CONFIG

    base_checkpoint: CheckpointId
    sampler: dict[str, Any]
    prompt_source: str = ""
    licence_note: str = ""
    image_to_image: ImageToImage | None = None

    def __post_init__(self) -> None:
        if isinstance(self.base_checkpoint, Mapping):
            base = read_record(CheckpointId, self.base_checkpoint, "base_checkpoint")
            object.__setattr__(self, "base_checkpoint", base)

    def to_json(self) -> str:
        """Return the text of dataset.json."""
        values = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        values["base_checkpoint"] = self.base_checkpoint.model_dump(mode="json")
        if self.image_to_image is None:
            del values["image_to_image"]
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def difference(self, other: "DatasetInfo") -> str | None:
        """Say in one line which checkpoint or sampler setting differs from `other`'s, or None.

        A checkpoint is its hash: a renamed file is the same one.
        """
        if not self.base_checkpoint.is_same_model(other.base_checkpoint):
            return "base_checkpoint.sha256 is another one in the dataset than here"
        if self.image_to_image != other.image_to_image:
            there, here = (_say(info.image_to_image) for info in (other, self))
            return f"the chosen image starts {there} in the dataset and {here} here"
        mine, theirs = (json.loads(info.to_json())["sampler"] for info in (self, other))
        for name in dict.fromkeys([*mine, *theirs]):
            ours, others = mine.get(name), theirs.get(name)
            if ours != others:
                if isinstance(ours, str) or isinstance(others, str):  # a negative prompt is nobody's business
                    return f"sampler.{name} is another one in the dataset than here"
                return f"sampler.{name} is {others!r} in the dataset and {ours!r} here"
        return None


def _say(how: ImageToImage | None) -> str:
    if how is None:
        return "from noise"
    negated = " and the unsafe prompt negated" if how.negates_unsafe else ""
    return f"from the rejected one with denoise {how.denoise}{negated}"


@dataclass(frozen=True)
class _DatasetFile(DatasetInfo):
    format_version: int = field(kw_only=True)


_PAIR = pydantic.TypeAdapter(PreferencePair)
_DATASET_FILE = pydantic.TypeAdapter(_DatasetFile)


def parse_pair(line: bytes, where: str) -> PreferencePair:
    """Read one line of metadata.jsonl.

    Raises:
        InputError: a field is unknown, missing or wrong, naming `where` and the field.
    """
    return parse_json_line(_PAIR, line, where)


def refuse_links(folder: Path) -> None:
    """Raise an InputError where a file or folder of a dataset is a link: whoever made it chose what is read or written.

    The dataset folder itself may be one; its user put it there.
    """
    for name in _OWN_NAMES:
        refuse_link(folder / name)


def find_dataset_file(folder: Path) -> Path:
    """Return the dataset.json of a folder.

    Raises:
        InputError: there is no such folder, or it holds no dataset.
    """
    path = folder / "dataset.json"
    if path.is_file():
        return path
    if not folder.is_dir():
        raise InputError(f"no dataset folder {folder}; check the name")
    if has_foreign_files(folder):
        raise InputError(f"{folder} is not a preference dataset: it has no dataset.json; choose another folder")
    raise InputError(f"{folder} holds no preference dataset yet; draw images for its prompt pairs first")


def has_foreign_files(folder: Path) -> bool:
    """Say whether a folder holds what neither a dataset nor `dataset import` puts there."""
    return any(path.name not in _OWN_NAMES and not path.name.startswith(".") for path in folder.iterdir())


def read_info(path: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        InputError: it was written by a newer version, or a field is unknown, missing or wrong.
    """
    with open_plain(path) as file:
        read = parse_json_line(_DATASET_FILE, file.read(), str(path))
    if read.format_version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {read.format_version}, not {FORMAT_VERSION}; update Safety Experts to read it"
        )
    values = {field.name: getattr(read, field.name) for field in dataclasses.fields(DatasetInfo)}
    return DatasetInfo(**values)
