"""The preference dataset on disk (design §3): crash-safe to write, resumable, and readable by HF `datasets`."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..files import check_usable, path_inside, read_stored, sha256_of_file, sync_file, sync_folder, write_atomically
from .categories import canonical_category
from .inspection import check_dataset
from .locking import lock_folder
from .metadata_file import MetadataFile
from .new_pair import NewPair
from .prompt_pair import PromptPair
from .records import (
    DatasetInfo,
    ImageToImage,
    PreferencePair,
    Review,
    find_dataset_file,
    has_foreign_files,
    read_info,
    refuse_links,
)
from .verdicts import TrainingRule, is_trained_on

__all__ = ["DatasetInfo", "ImageToImage", "NewPair", "PreferenceDataset", "PreferencePair"]


class PreferenceDataset:
    """An open dataset: `folder`, `info`, `pairs` in file order and their `ids`. Make one by `create` or `open`.

    Several processes may add and change pairs of one folder at the same time; each sees what the others wrote when it
    writes itself, or on `refresh`.
    """

    folder: Path
    info: DatasetInfo

    def __init__(self, folder: Path, info: DatasetInfo):
        self.folder, self.info = folder, info
        self._metadata = MetadataFile(folder / "metadata.jsonl")

    @property
    def pairs(self) -> list[PreferencePair]:
        """All pairs in file order."""
        return self._metadata.pairs

    @property
    def ids(self) -> KeysView[str]:
        """The ids of all pairs, in file order."""
        return self._metadata.index.keys()

    def pair(self, pair_id: str) -> PreferencePair:
        """Return the pair with this id.

        Raises:
            InputError: there is none.
        """
        if pair_id not in self._metadata.index:
            raise InputError(f"{self.folder} has no pair with this id; look ids up in metadata.jsonl")
        return self.pairs[self._metadata.index[pair_id]]

    @classmethod
    def create(cls, folder: str | os.PathLike, info: DatasetInfo) -> "PreferenceDataset":
        """Start a dataset, or open the one that is there if it was made with the same checkpoint and sampler settings.

        Raises:
            InputError: the folder holds something else, or a dataset made with other settings.
            SafetyExpertsError: it cannot be written.
        """
        folder = Path(folder)
        file = folder / "dataset.json"
        check_usable(folder)
        refuse_links(folder)
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
        with _writing(folder), lock_folder(folder):
            dataset._metadata.read()
            dataset._metadata.mend()
        if difference := info.difference(dataset.info):
            raise InputError(f"{file}: {difference}; choose another dataset name or the same settings")
        return dataset

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "PreferenceDataset":
        """Open a dataset; nothing is written. A last line that a killed process left half-written is left out.

        Raises:
            InputError: there is no dataset, a file of it is a link, or dataset.json or a line of metadata.jsonl is
                wrong, naming the field.
        """
        folder = Path(folder)
        check_usable(folder)
        try:
            refuse_links(folder)
            dataset = cls(folder, read_info(find_dataset_file(folder)))
        except OSError as error:
            raise _cannot_read(folder, error) from error
        dataset.refresh()
        return dataset

    def refresh(self) -> None:
        """Take in what other processes wrote since.

        Raises:
            InputError: as from `open`.
        """
        try:
            self._metadata.read()
        except OSError as error:
            raise _cannot_read(self.folder, error) from error

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

        Where the seed is unknown the id comes from the pictures too, so several pairs may have the same prompts.

        Args:
            prompt_pair: the prompts, categories and seed the images were drawn from.
            chosen: the image to prefer, of any mode; saved as RGB.
            rejected: the other one, of the same size.

        Raises:
            InputError: the images differ in size, or a score or the review is not valid.
            SafetyExpertsError: the disk is full or the folder cannot be written; the dataset is as it was.
        """
        new = NewPair(prompt_pair, chosen, rejected, chosen_unsafe, rejected_unsafe, scores or {}, review)
        return self.add_many([new])[0]

    def add_many(self, new_pairs: Sequence[NewPair]) -> list[PreferencePair]:
        """Write pairs as `add` does, all of them or none, and wait for the disk once for all: for tens at a time."""
        ready = []
        for new in new_pairs:
            images = (new.chosen, new.rejected)
            ready.append((new.record(), [partial(image.save, format="PNG") for image in images]))
        return self._write(ready)

    def copy_from(self, other: "PreferenceDataset", pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """Take pairs of another dataset in, as `add_many`: images and lines stay what they are."""
        ready = []
        for pair in pairs:
            files = other.image_paths(pair)
            ready.append((pair, [partial(_copy_file, file) for file in files]))
        return self._write(ready)

    def _write(self, ready: Sequence[tuple[PreferencePair, Sequence[Callable[[Path], None]]]]) -> list[PreferencePair]:
        with _writing(self.folder), lock_folder(self.folder):
            refuse_links(self.folder)
            self._metadata.read()
            fresh = {pair.id: (pair, savers) for pair, savers in ready if pair.id not in self.ids}
            written: list[Path] = []
            try:
                for pair, savers in fresh.values():
                    for path, save in zip(self.image_paths(pair), savers, strict=True):
                        written.append(path)
                        with write_atomically(path, sync=False) as temporary:
                            save(temporary)
                for path in written:
                    sync_file(path)
                if written:
                    sync_folder(written[0].parent)
                self._metadata.append([pair for pair, _ in fresh.values()])
            except BaseException:
                if not any(pair_id in self.ids for pair_id in fresh):  # no lines, so there must be no images either
                    for path in written:
                        path.unlink(missing_ok=True)
                raise
        return [self.pair(pair.id) for pair, _ in ready]

    def set_review(self, pair_id: str, review: Review | None) -> PreferencePair:
        """Record a reviewer's verdict on one pair (None takes it back); as `update`."""
        return self.update(pair_id, review=review)

    def update(self, pair_id: str, **fields: Any) -> PreferencePair:
        """Change fields of one pair; as `update_many`."""
        self.update_many({pair_id: fields})
        return self.pair(pair_id)

    def update_many(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Change `review`, `scores`, `chosen_unsafe`, `rejected_unsafe`, `concept` or `categories` of pairs.

        All of it is on the disk on return, or nothing: kill -9 at any moment leaves the old file or the new one. What
        other processes wrote meanwhile is kept. `scores` are added to other judges' scores; one of None is removed.

        Args:
            changes: id -> field -> value.

        Raises:
            InputError: there is no such pair or field, or a value is not valid; nothing is changed.
            SafetyExpertsError: the disk is full or the folder cannot be written.
        """
        if not changes:
            return
        with _writing(self.folder), lock_folder(self.folder):
            refuse_links(self.folder)
            self._metadata.read()
            changed = {pair_id: self.pair(pair_id).changed(fields) for pair_id, fields in changes.items()}
            self._metadata.replace(changed)

    def training_pairs(self, category: str | None = None, rule: TrainingRule = "all") -> list[PreferencePair]:
        """Return the pairs to train on, in file order: dropped ones left out, flipped ones swapped (files and flags).

        Args:
            category: only pairs of this category, in any spelling; None for all.
            rule: which pairs count, by what judges and reviewers said of them (`verdicts.is_trained_on`).

        Raises:
            InputError: nothing is left; the message names the categories there are.
        """
        kept = [pair for pair in self.pairs if pair.review != "dropped"]
        wanted = canonical_category(category) if category is not None else None
        selected = [pair for pair in kept if wanted is None or wanted in pair.categories]
        trained_on = [pair for pair in selected if is_trained_on(pair, rule)]
        if selected and not trained_on:
            raise InputError(
                f"{self.folder}: none of {len(selected)} pairs is {rule.replace('-', ' ')}; "
                "judge the dataset, review the doubtful pairs, or train on all"
            )
        if not selected:
            counts = Counter(name for pair in kept for name in pair.categories)
            there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
            if wanted is None or not there:
                raise InputError(
                    f"{self.folder} has no pairs to train on ({len(self.pairs)} in all); add or accept some"
                )
            raise InputError(f"{self.folder} has no pairs of category {wanted!r} to train on; it has {there}")
        return [pair.swapped() if pair.review == "flipped" else pair for pair in trained_on]

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
            images = [sha256_of_file(path, follow_links=False) for path in self.image_paths(pair)]
            digest.update("\n".join([pair.to_json(leave_out_empty_concept=True), *images, ""]).encode())
        return digest.hexdigest()

    def check(self) -> list[str]:
        """Return everything wrong with the folder as it is on disk, one line a problem, naming the file."""
        return check_dataset(self.folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SafetyExpertsError(f"cannot write {folder}: {reason}; check the free space and the rights") from error


def _copy_file(source: Path, target: Path) -> None:
    target.write_bytes(read_stored(source))


def _cannot_read(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {folder}: {error.strerror or error}; check its rights")
