"""kohya sd-scripts: a folder with `w` (winners) and `l` (losers), the same file names, captions as .txt."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..dataset import PreferenceDataset, PreferencePair
from .folders import pairs_of_two_folders, write_two_folders
from .format import Format, FoundPair, Source


def _read(source: Source) -> Iterator[FoundPair]:
    return pairs_of_two_folders(source, source.path / "w", source.path / "l")


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    write_two_folders(dataset, pairs, folder, "w", "l")


FORMAT = Format(
    title="kohya sd-scripts",
    layout="folders w (winners) and l (losers), equal file names, captions as .txt; subset with preference = true",
    published="kohya-ss/sd-scripts pull request 1427",
    read=_read,
    write=_write,
)
