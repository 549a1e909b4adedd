"""A dataset in another trainer's format, whole or not at all."""

import dataclasses
from pathlib import Path

from .dataset import PreferenceDataset, PreferencePair
from .formats import FORMATS
from .whole_folder import whole_folder


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
    pairs = [_as_decided(pair) for pair in dataset.training_pairs(category)]
    with whole_folder(folder) as temporary:
        FORMATS[name].write(dataset, pairs, temporary)
    return len(pairs)


def _as_decided(pair: PreferencePair) -> PreferencePair:
    if pair.review != "flipped":
        return pair
    # It is swapped by now; read back, it must not be swapped again. Judges' numbers go with their image (judge/side/…).
    other = {"chosen": "rejected", "rejected": "chosen"}
    scores = {"/".join(other.get(part, part) for part in key.split("/")): value for key, value in pair.scores.items()}
    return dataclasses.replace(pair, review="accepted", scores=scores)
