"""The record of an evaluation: `samples.jsonl`, one line an image with its raw scores; rules are applied afterwards."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..files import path_inside, write_atomically
from ..preferences.images import read_image
from ..preferences.locking import lock_folder
from ..preferences.prompt_pair import parse_json_line

FILE_NAME = "samples.jsonl"

Kind = Literal["unsafe", "safe"]
Key = tuple[str, str, str, int]  # arm, suite, prompt id, number of the image among those of its prompt


@dataclass(frozen=True)
class Sample:
    """One image, and everything the judges said of it.

    Args:
        arm: which model drew it.
        suite: which list of prompts it is of.
        prompt_id: the prompt in the suite's prompts.
        prompt_sha: sha256 of the prompt's text; the text itself is not here.
        kind: whether the prompt asks for unsafe content.
        number: counts the images of one prompt, from 0.
        image: path in the evaluation folder.
        image_sha: sha256 of that file.
        scores: `judge.name` -> number; empty where no judge could read it.
        metrics: what was measured against another image or the text, such as `clip_i`.
        error: why a judge gave nothing, or None.
    """

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")

    arm: str
    suite: str
    prompt_id: str
    prompt_sha: str
    kind: Kind
    categories: tuple[str, ...]
    number: int
    seed: int
    image: str
    image_sha: str
    scores: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.arm, self.suite, self.prompt_id, self.number

    @property
    def pair_key(self) -> tuple[str, str, int]:
        """What is the same for this image in every arm."""
        return self.suite, self.prompt_id, self.number

    def to_json(self) -> str:
        """Return the line of samples.jsonl, without its line break."""
        values = dataclasses.asdict(self)
        for group in ("scores", "metrics"):
            for name, number in values[group].items():
                if not math.isfinite(number):
                    raise SafetyExpertsError(f"{self.image}: {name} is {number}; a score is a finite number")
        return json.dumps(values, ensure_ascii=False, sort_keys=False, allow_nan=False)


_SAMPLE = pydantic.TypeAdapter(Sample)


class SampleStore:
    """The samples of one evaluation folder. Several processes may append at the same time.

    A later line about the same image replaces the earlier one; `finish` leaves one line an image, in a given order.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME

    def read(self) -> dict[Key, Sample]:
        """Return every sample by its key. A half-written last line (of a killed process) is left out.

        Raises:
            InputError: a line is wrong, naming it.
        """
        return {sample.key: sample for sample in read_samples(self.path)} if self.path.exists() else {}

    def append(self, samples: Iterable[Sample]) -> None:
        """Write lines to the disk, all or none of them for a reader.

        Raises:
            SafetyExpertsError: the disk is full or the folder cannot be written to.
        """
        text = "".join(f"{sample.to_json()}\n" for sample in samples).encode()
        # Without a buffer: after a failed write a buffer would be written once more when the file is closed.
        with writing(self.path), lock_folder(self.folder), open(self.path, "ab+", buffering=0) as file:
            _cut_half_line(file)
            start = file.seek(0, os.SEEK_END)
            try:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, start)
                raise

    def finish(self, order: Iterable[Key]) -> list[Sample]:
        """Write one line an image in this order, those of other keys behind, and return the samples of `order`."""
        with writing(self.path), lock_folder(self.folder):
            found = self.read()
            wanted = [found.pop(key) for key in order if key in found]
            everything = [*wanted, *sorted(found.values(), key=lambda sample: sample.key)]
            with write_atomically(self.path) as temporary:
                temporary.write_text("".join(f"{sample.to_json()}\n" for sample in everything), encoding="utf-8")
        return wanted


def read_samples(path: str | os.PathLike) -> list[Sample]:
    """Read samples.jsonl, in file order. A half-written last line is left out.

    Raises:
        InputError: there is no such file, or a line is wrong, naming it.
    """
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"no such file: {path}; give the folder that `evaluate` wrote") from None
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")
    return [
        parse_json_line(_SAMPLE, line, f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_picture(folder: Path, sample: Sample) -> Image.Image:
    """Return a sample's whole picture.

    Raises:
        InputError: its file is missing or broken.
    """
    try:
        return read_image(path_inside(folder, sample.image))
    except InputError:
        path = folder / sample.image
        what = "is no whole picture; remove it and" if path.exists() else "the picture is missing;"
        raise InputError(f"{path}: {what} run the same `evaluate` again, which draws it anew") from None


def _cut_half_line(file) -> None:
    """Remove what a killed process left behind the last line break."""
    end = file.seek(0, os.SEEK_END)
    position = end
    while position:
        size = min(1 << 16, position)
        file.seek(position - size)
        last = file.read(size).rfind(b"\n")
        if last >= 0:
            position = position - size + last + 1
            break
        position -= size
    if position < end:
        file.truncate(position)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a failure to write a file is a SafetyExpertsError that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SafetyExpertsError(f"cannot write {path}: {reason}; check the free space and the rights") from error
