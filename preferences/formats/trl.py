"""TRL's preference rows with images: parquet with prompt, chosen, rejected."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..dataset import PreferenceDataset, PreferencePair
from .format import OUR_FIELDS, Format, FoundPair, Source, our_fields
from .parquet import image_of, read_rows, text_of, write_rows

_COLUMNS = {"prompt": "string", "chosen": "image", "rejected": "image", OUR_FIELDS: "string"}


def _read(source: Source) -> Iterator[FoundPair]:
    for where, row in read_rows(source.path, ("prompt", "chosen", "rejected"), (OUR_FIELDS,)):
        yield source.pair(
            text_of(row, "prompt", where),
            image_of(row["chosen"], where, "chosen"),
            image_of(row["rejected"], where, "rejected"),
            where,
            row.get(OUR_FIELDS),
        )


def _row(number: int, pair: PreferencePair, chosen: bytes, rejected: bytes) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "chosen": {"bytes": chosen, "path": f"{number:07}-chosen.png"},
        "rejected": {"bytes": rejected, "path": f"{number:07}-rejected.png"},
        OUR_FIELDS: our_fields(pair),
    }


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    write_rows(folder / "train.parquet", dataset, pairs, _COLUMNS, _row)


FORMAT = Format(
    title="TRL preference rows",
    layout="parquet: prompt, chosen, rejected (images as bytes, or Hugging Face's image columns)",
    published="TRL's dataset formats; nbeerbower's sets on Hugging Face",
    read=_read,
    write=_write,
)
