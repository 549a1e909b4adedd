"""A folder that appears whole or not at all, and a dataset written that way from pairs of others."""

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from ..files import check_usable, read_stored, sync_folder
from .records import DatasetInfo, PreferencePair


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it takes that name on success and is removed on any failure.

    Raises:
        InputError: `folder` is there and not empty.
        SafetyExpertsError: it cannot be written.
    """
    check_usable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty; choose another --out")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-unfinished-????????"):  # of a killed one
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-unfinished-", dir=folder.parent))
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        reason = error.strerror or error
        raise SafetyExpertsError(f"cannot write {folder}: {reason}; check the free space and the rights") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(
    folder: Path, info: DatasetInfo, pairs: Iterable[tuple[PreferencePair, tuple[Path, Path]]]
) -> list[PreferencePair]:
    """Write a dataset of pairs that exist, with (chosen, rejected) image files to copy; everything else of them stays.

    Raises:
        InputError: the folder is not empty, or an image is missing or a link.
        SafetyExpertsError: it cannot be written.
    """
    written = []
    with whole_folder(folder) as temporary:
        (temporary / "images").mkdir()
        (temporary / "dataset.json").write_text(info.to_json(), encoding="utf-8")
        with open(temporary / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as lines:
            for pair, paths in pairs:
                for name, path in zip((pair.chosen_file_name, pair.rejected_file_name), paths, strict=True):
                    target = temporary / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(read_stored(path))
                lines.write(pair.to_json() + "\n")
                written.append(pair)
    return written
