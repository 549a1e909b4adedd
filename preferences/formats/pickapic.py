"""Pick-a-Pic v1 and v2, as Hugging Face serves them: parquet with the images as bytes."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..dataset import PreferenceDataset, PreferencePair
from .format import OUR_FIELDS, Format, our_fields
from .labelled_parquet import read_labelled
from .parquet import write_rows

_COLUMNS = {
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "float64",
    "label_1": "float64",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    OUR_FIELDS: "string",
}


def _row(number: int, pair: PreferencePair, chosen: bytes, rejected: bytes) -> dict[str, Any]:
    return {
        "are_different": True,
        "best_image_uid": f"{pair.id}-chosen",
        "caption": pair.prompt,
        "created_at": datetime.datetime(1970, 1, 1),  # not known; the same export gives the same bytes
        "has_label": True,
        "image_0_uid": f"{pair.id}-chosen",
        "image_0_url": "",
        "image_1_uid": f"{pair.id}-rejected",
        "image_1_url": "",
        "jpg_0": chosen,  # PNG, in spite of the column's name; readers look at the bytes
        "jpg_1": rejected,
        "label_0": 1.0,
        "label_1": 0.0,
        "model_0": "",
        "model_1": "",
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": 1,
        OUR_FIELDS: our_fields(pair),
    }


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    write_rows(folder / "train.parquet", dataset, pairs, _COLUMNS, _row)


FORMAT = Format(
    title="Pick-a-Pic v1, v2",
    layout="parquet: caption, jpg_0, jpg_1 (bytes), label_0, label_1, has_label, …; ties are left out",
    published="yuvalkirstain/pickapic_v2 on Hugging Face",
    read=read_labelled,
    write=_write,
)
