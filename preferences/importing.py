"""Datasets from images that exist already, in any of the formats of `formats/`."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..files import check_usable
from .dataset import NewPair, PreferenceDataset
from .formats import FORMATS, FoundPair, Source
from .inspection import Progress
from .records import DatasetInfo

_PAIRS_AT_ONCE = 32


@dataclass(frozen=True)
class Imported:
    """What an import made: `skipped` counts by reason what was no pair (ties, images of two sizes)."""

    dataset: PreferenceDataset
    skipped: dict[str, int] = field(default_factory=dict)


def import_dataset(
    name: str,
    path: Path,
    dataset_folder: Path,
    *,
    images_folder: Path | None = None,
    categories: tuple[str, ...] = (),
    on_progress: Progress | None = None,
) -> Imported:
    """Make a preference dataset of another format's files; killed, it continues where it was.

    Args:
        name: of the format, a key of `FORMATS`.
        path: the file or folder.
        images_folder: where the images are that a file names; None: beside it.
        categories: of pairs whose categories the format does not say.
        on_progress: called with (pairs done, 0: how many there are is not known).

    Raises:
        InputError: a file is wrong, or an image is missing or damaged, naming file and line.
    """
    for given in (path, images_folder):
        if given is not None:
            check_usable(given)
    source = Source(path, images_folder, categories)
    pairs = FORMATS[name].read(source)
    first = next(pairs, None)  # a source that is wrong from its start leaves no folder behind
    if first is None:
        raise InputError(f"{path}: holds no pairs of format {name}{_list_skipped(source.skipped)}")
    info = DatasetInfo({}, {}, path.name, f"imported; the licence of {path.name} and its images applies")
    dataset = PreferenceDataset.create(dataset_folder, info)
    ready: list[NewPair] = []
    num_done = 0
    found: FoundPair | None = first
    try:
        while found is not None:
            chosen, rejected = found.chosen(), found.rejected()
            if chosen.size == rejected.size:
                flags = (found.chosen_unsafe, found.rejected_unsafe, found.scores, found.review)
                ready.append(NewPair(found.prompt_pair, chosen, rejected, *flags))
            else:
                source.skip("images of two sizes")
            num_done += 1
            found = next(pairs, None)
            if len(ready) == _PAIRS_AT_ONCE:
                dataset.add_many(ready)
                ready = []
                if on_progress:
                    on_progress(num_done, 0)
    finally:
        dataset.add_many(ready)  # what was read before an error or an interrupt is kept
    return Imported(dataset, source.skipped)


def _list_skipped(skipped: dict[str, int]) -> str:
    return "".join(f"; {count} × {reason}" for reason, count in skipped.items()) + "; check the file and the format"
