"""CoProV2: the CSV with `u_` and `s_` images of the paper's repository, and the parquet of its Hugging Face sets."""

import csv
import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ...errors import InputError
from ..dataset import PreferenceDataset, PreferencePair
from ..prompt_csv import read_coprov2
from .folders import copy_image
from .format import OUR_FIELDS, Format, FoundPair, Source, image_file, number_names, our_fields, with_our_fields
from .parquet import RowGroups, image_of, text_of

_CSV = "train.csv"


def _read(source: Source) -> Iterator[FoundPair]:
    if (source.path / _CSV).is_file():  # the folder of an export
        source = dataclasses.replace(source, path=source.path / _CSV)
    if source.path.suffix.lower() == ".csv":
        return _read_csv(source)
    return _read_parquet(source)


def _read_csv(source: Source) -> Iterator[FoundPair]:
    folder = source.images_folder()
    for entry in read_coprov2(source.path, with_images=True):
        chosen, rejected = (image_file(folder, name, entry.where) for name in (entry.safe_image, entry.unsafe_image))
        found = FoundPair(entry.pair, chosen, rejected, entry.where, chosen_unsafe=False, rejected_unsafe=True)
        yield with_our_fields(found, entry.our_fields, entry.where) if entry.our_fields else found


def _read_parquet(source: Source) -> Iterator[FoundPair]:
    """Two rows are a pair: the same jpg_0 and jpg_1, once with either image; they may stand far apart."""
    with RowGroups(source.path, ("image", "jpg_0", "jpg_1", "label_0", "caption")) as rows:
        first_rows: dict[tuple[str, str], int] = {}
        for number, row in enumerate(rows.without("image")):
            where = rows.where(number)
            names = text_of(row, "jpg_0", where), text_of(row, "jpg_1", where)
            other = first_rows.pop(names, None)
            if other is None:
                first_rows[names] = number
                continue
            if row["label_0"] not in (0, 1):
                source.skip("tie")
                continue
            by_side = {_side(rows[index]["image"], names, rows.where(index)): index for index in (other, number)}
            if len(by_side) < 2:
                raise InputError(f"{where}: both rows of the pair hold the same image; take the set as published")
            winner = 0 if row["label_0"] == 1 else 1
            chosen, rejected = (functools.partial(_image, rows, by_side[side]) for side in (winner, 1 - winner))
            yield source.pair(text_of(row, "caption", where), chosen, rejected, where, None)
        for _ in first_rows:
            source.skip("row without its partner")


def _side(image: Any, names: tuple[str, str], where: str) -> int:
    path = image.get("path") if isinstance(image, dict) else None
    name = PurePosixPath(path or "").name
    found = [side for side in (0, 1) if PurePosixPath(names[side]).name == name]
    if len(found) != 1:
        raise InputError(f"{where}: the image's path is neither jpg_0's nor jpg_1's; take the set as published")
    return found[0]


def _image(rows: RowGroups, index: int) -> Image.Image:
    return image_of(rows[index]["image"], rows.where(index), "image")()


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("prompt", "image", "category", OUR_FIELDS))
    for name, pair in number_names(pairs):
        chosen, rejected = dataset.image_paths(pair)
        copy_image(chosen, folder, f"images/s_idx_{name}_0.png")
        copy_image(rejected, folder, f"images/u_idx_{name}_0.png")
        for category in pair.categories or ("",):
            writer.writerow((pair.prompt, f"images/u_idx_{name}_0.png", category, our_fields(pair)))
            writer.writerow((pair.safe_prompt, f"images/s_idx_{name}_0.png", category, our_fields(pair)))
    (folder / _CSV).write_text(text.getvalue(), encoding="utf-8", newline="")


FORMAT = Format(
    title="CoProV2",
    layout="CSV prompt, image, category with u_… (unsafe) and s_… (safe) images; or parquet with label_0 (read only)",
    published="Visualignment/SafetyDPO; Visualignment/CoProv2-SD15 on Hugging Face",
    read=_read,
    write=_write,
)
