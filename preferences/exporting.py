"""A dataset in another trainer's format, whole or not at all."""

import dataclasses
import glob
import shutil
import tempfile
from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from ..files import check_usable
from .dataset import PreferenceDataset, PreferencePair
from .formats import FORMATS


def export_dataset(dataset: PreferenceDataset, name: str, folder: Path, category: str | None = None) -> int:
    """Write the pairs to train on into a new folder: dropped ones left out, flipped ones swapped; return how many.

    Args:
        name: of the format, a key of `FORMATS`.
        folder: must not exist, or be empty; it appears whole, or not.
        category: only pairs of this one.

    Raises:
        InputError: the folder holds something, there are no pairs, or an image is missing or a link.
        SafetyExpertsError: it cannot be written.
    """
    check_usable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty; choose another --out")
    pairs = [_as_decided(pair) for pair in dataset.training_pairs(category)]
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-export-????????"):  # of a killed export
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-export-", dir=folder.parent))
        FORMATS[name].write(dataset, pairs, temporary)
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise SafetyExpertsError(f"cannot write {folder}: {reason}; check the free space and the rights") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return len(pairs)


def _as_decided(pair: PreferencePair) -> PreferencePair:
    # A flipped pair is swapped by now; read back, it must not be swapped again.
    return dataclasses.replace(pair, review="accepted") if pair.review == "flipped" else pair
