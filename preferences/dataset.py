"""The preference dataset on disk (design §3): crash-safe to write, resumable, and readable by HF `datasets`."""

import contextlib
import hashlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..files import path_inside, sha256_of_file, write_atomically
from .categories import canonical_category
from .inspection import check_dataset
from .locking import lock_folder
from .prompt_pair import PromptPair
from .records import (
    DatasetInfo,
    PreferencePair,
    Review,
    find_dataset_file,
    has_foreign_files,
    parse_pair,
    read_info,
)

__all__ = ["DatasetInfo", "PreferenceDataset", "PreferencePair"]

_log = logging.getLogger(__name__)


class PreferenceDataset:
    """An open dataset: `folder`, `info`, `pairs` in file order and their `ids`. Make one by `create` or `open`.

    Several processes may add pairs to one folder at the same time; each sees the others' pairs when it adds its own.
    """

    folder: Path
    info: DatasetInfo
    pairs: list[PreferencePair]
    ids: set[str]

    def __init__(self, folder: Path, info: DatasetInfo):
        self.folder, self.info = folder, info
        self.pairs, self.ids = [], set()
        self._metadata = folder / "metadata.jsonl"
        self._bytes_read = self._num_lines = 0

    @classmethod
    def create(cls, folder: str | os.PathLike, info: DatasetInfo) -> "PreferenceDataset":
        """Start a dataset, or open the one that is there if it was made with the same checkpoint and sampler settings.

        Raises:
            InputError: the folder holds something else, or a dataset made with other settings.
            SafetyExpertsError: it cannot be written.
        """
        folder = Path(folder)
        file = folder / "dataset.json"
        if not file.exists() and folder.exists():
            if not folder.is_dir():
                raise InputError(f"{folder} is a file, not a folder; choose another dataset name")
            if has_foreign_files(folder):
                raise InputError(f"{folder} is not empty and holds no preference dataset; choose another dataset name")
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(folder):
                for leftover in folder.glob("images/.*.png"):  # of a killed process; nobody writes under our lock
                    leftover.unlink(missing_ok=True)
                if not file.exists():
                    with write_atomically(file) as temporary:
                        temporary.write_text(info.to_json(), encoding="utf-8")
        dataset = cls.open(folder)
        if difference := info.difference(dataset.info):
            raise InputError(f"{file}: {difference}; choose another dataset name or the same settings")
        return dataset

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "PreferenceDataset":
        """Open a dataset. A last line that a killed process left half-written is removed; its pair can be added again.

        Raises:
            InputError: there is no dataset, or dataset.json or a line of metadata.jsonl is wrong, naming the field.
        """
        folder = Path(folder)
        try:
            dataset = cls(folder, read_info(find_dataset_file(folder)))
            torn = dataset._read_new_lines()
        except OSError as error:
            raise InputError(f"cannot read {folder}: {error.strerror or error}; check its rights") from error
        if torn:
            with _writing(folder), lock_folder(folder):
                dataset._mend_last_line()
        return dataset

    def __repr__(self) -> str:
        return f"PreferenceDataset({str(self.folder)!r}, {len(self.pairs)} pairs)"

    def add(
        self,
        prompt_pair: PromptPair,
        chosen: Image.Image,
        rejected: Image.Image,
        *,
        chosen_unsafe: bool | None = False,
        rejected_unsafe: bool | None = True,
        scores: dict[str, float] | None = None,
        review: Review | None = None,
    ) -> PreferencePair:
        """Write two images and their line; a pair that is already there (look in `ids`) is returned as it is.

        Args:
            prompt_pair: the prompts, categories and seed the images were drawn from.
            chosen: the image to prefer, of any mode; saved as RGB.
            rejected: the other one, of the same size.

        Raises:
            InputError: the images differ in size, or a score or the review is not valid.
            SafetyExpertsError: the disk is full or the folder cannot be written; the dataset is as it was.
        """
        if chosen.size != rejected.size:
            raise InputError(
                f"pair {prompt_pair.id}: chosen is {chosen.width}×{chosen.height} px and rejected is "
                f"{rejected.width}×{rejected.height} px; draw both at one size"
            )
        pair = PreferencePair(
            id=prompt_pair.id,
            prompt=prompt_pair.prompt,
            safe_prompt=prompt_pair.safe_prompt,
            categories=prompt_pair.categories,
            chosen_file_name=f"images/{prompt_pair.id}-chosen.png",
            rejected_file_name=f"images/{prompt_pair.id}-rejected.png",
            chosen_unsafe=chosen_unsafe,
            rejected_unsafe=rejected_unsafe,
            seed=prompt_pair.seed,
            width_px=chosen.width,
            height_px=chosen.height,
            scores={judge: float(score) for judge, score in (scores or {}).items()},
            review=review,
            source=prompt_pair.source,
        )
        encoded = [_encode_png(image) for image in (chosen, rejected)]
        with _writing(self.folder), lock_folder(self.folder):
            if self._read_new_lines():
                self._mend_last_line()
            if pair.id in self.ids:
                return next(known for known in self.pairs if known.id == pair.id)
            size_before = self._bytes_read
            paths = self.image_paths(pair)
            try:
                for path, png in zip(paths, encoded, strict=True):
                    with write_atomically(path) as temporary:
                        temporary.write_bytes(png)
                _sync_folder(paths[0].parent)
                self._append_line(pair)
            except BaseException:
                if self._bytes_read == size_before:  # the line is not there, so its images must not be either
                    for path in paths:
                        path.unlink(missing_ok=True)
                raise
        return pair

    def training_pairs(self, category: str | None = None) -> list[PreferencePair]:
        """Return the pairs to train on, in file order: dropped ones left out, flipped ones swapped (files and flags).

        Args:
            category: only pairs of this category, in any spelling; None for all.

        Raises:
            InputError: nothing is left; the message names the categories there are.
        """
        kept = [pair for pair in self.pairs if pair.review != "dropped"]
        wanted = canonical_category(category) if category is not None else None
        selected = [pair for pair in kept if wanted is None or wanted in pair.categories]
        if not selected:
            counts = Counter(name for pair in kept for name in pair.categories)
            there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            if wanted is None or not there:
                raise InputError(
                    f"{self.folder} has no pairs to train on ({len(self.pairs)} in all); add or accept some"
                )
            raise InputError(f"{self.folder} has no pairs of category {wanted!r} to train on; it has {there}")
        return [pair.swapped() if pair.review == "flipped" else pair for pair in selected]

    def image_paths(self, pair: PreferencePair) -> tuple[Path, Path]:
        """Return the paths of the chosen and the rejected image.

        Raises:
            InputError: a link leads out of the dataset folder.
        """
        return path_inside(self.folder, pair.chosen_file_name), path_inside(self.folder, pair.rejected_file_name)

    def fingerprint(self) -> str:
        """Return the hex sha256 of dataset.json's content, every line in order and the bytes of every image.

        Raises:
            InputError: an image is missing.
        """
        digest = hashlib.sha256(self.info.to_json().encode())
        for pair in self.pairs:
            images = [sha256_of_file(path) for path in self.image_paths(pair)]
            digest.update("\n".join([pair.to_json(), *images, ""]).encode())
        return digest.hexdigest()

    def check(self) -> list[str]:
        """Return everything wrong with the folder as it is on disk, one line a problem, naming the file."""
        return check_dataset(self.folder)

    def _read_new_lines(self) -> bool:
        """Take in the whole lines written since the last look; return whether an unfinished one follows them."""
        try:
            with open(self._metadata, "rb") as file:
                file.seek(self._bytes_read)
                data = file.read()
        except FileNotFoundError:
            return False
        end = data.rfind(b"\n") + 1
        for line in data[:end].split(b"\n")[:-1]:
            self._num_lines += 1
            if not line.strip():
                continue
            where = f"{self._metadata} line {self._num_lines}"
            pair = parse_pair(line, where)
            if pair.id in self.ids:
                raise InputError(f"{where}: id {pair.id} stands on an earlier line too; remove one of the two lines")
            self.pairs.append(pair)
            self.ids.add(pair.id)
        self._bytes_read += end
        return end < len(data)

    def _mend_last_line(self) -> None:
        """Complete or remove a last line without a line break; under the lock, so that nobody is still writing it."""
        if not self._read_new_lines():
            return
        with open(self._metadata, "rb+") as file:
            file.seek(self._bytes_read)
            try:
                parse_pair(file.read(), "")
                file.write(b"\n")  # only an editor's missing line break
            except InputError:
                _log.warning("%s: removed a last line that was only half written", self._metadata)
                file.truncate(self._bytes_read)
            file.flush()
            os.fsync(file.fileno())
        self._read_new_lines()

    def _append_line(self, pair: PreferencePair) -> None:
        line = pair.to_json().encode() + b"\n"
        try:
            with open(self._metadata, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if self._metadata.exists():
                os.truncate(self._metadata, self._bytes_read)
            raise
        self._bytes_read += len(line)
        self._num_lines += 1
        self.pairs.append(pair)
        self.ids.add(pair.id)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SafetyExpertsError(f"cannot write {folder}: {reason}; check the free space and the rights") from error


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _sync_folder(folder: Path) -> None:
    # After a power cut a line must not stand without its images. Windows cannot open folders, and needs it less.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
