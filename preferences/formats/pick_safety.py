"""pick-safety: Pick-a-Pic's rows with whole-number labels and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..dataset import PreferenceDataset, PreferencePair
from .format import OUR_FIELDS, Format, our_fields
from .labelled_parquet import read_labelled
from .parquet import write_rows

_COLUMNS = {
    "caption": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "int64",
    "label_1": "int64",
    OUR_FIELDS: "string",
}


def _row(number: int, pair: PreferencePair, chosen: bytes, rejected: bytes) -> dict[str, Any]:
    labelled = {"caption": pair.prompt, "jpg_0": chosen, "jpg_1": rejected, "label_0": 1, "label_1": 0}
    return labelled | {OUR_FIELDS: our_fields(pair)}


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    write_rows(folder / "train.parquet", dataset, pairs, _COLUMNS, _row)


FORMAT = Format(
    title="pick-safety",
    layout="parquet: caption, jpg_0, jpg_1 (bytes), label_0, label_1 (whole numbers)",
    published="mapo-t2i/pick-safety on Hugging Face",
    read=read_labelled,
    write=_write,
)
