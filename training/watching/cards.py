"""An expert's card with what lies beside its file: when it was trained, and pictures before and after."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ...experts.card import Card, CardNumber
from ...experts.description import describe_file
from .run_files import read_state, sample_steps

PREVIEW_SUFFIX = ".preview.png"  # as LoRA managers look for it


def make_card(path: Path, numbers: Sequence[CardNumber] = ()) -> Card:
    """Return the card of an expert file.

    Raises:
        InputError: the file cannot be read as a LoRA.
    """
    return Card(describe_file(path), _trained_on(path), numbers)


def pictures_of(path: Path) -> list[tuple[int, int]]:
    """Return (step, number of pictures) of the first and the last samples of an expert's training."""
    steps = sample_steps(path)
    return list(dict.fromkeys([*steps[:1], *steps[-1:]]))


def _trained_on(path: Path) -> str:
    try:
        return f"{read_state(path).started[:10]} (UTC)"
    except InputError:
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
        return f"file written {written.date().isoformat()}"
