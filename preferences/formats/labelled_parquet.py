"""The rows that Pick-a-Pic began: caption, two images as bytes, and a label each, 1 for the better one."""

from collections.abc import Iterator

from ...errors import InputError
from .format import OUR_FIELDS, FoundPair, Source
from .parquet import image_of, read_rows, text_of


def read_labelled(source: Source) -> Iterator[FoundPair]:
    """Yield the pairs in which one image is better; ties and rows without a label are counted.

    Raises:
        InputError: a column is missing or a row is wrong.
    """
    required = ("caption", "jpg_0", "jpg_1", "label_0")
    for where, row in read_rows(source.path, required, ("has_label", OUR_FIELDS)):
        label = row["label_0"]
        if row.get("has_label") is False or label is None:
            source.skip("no label")
            continue
        if label == 0.5:
            source.skip("tie")
            continue
        if label not in (0, 1):
            raise InputError(f"{where}: label_0 is neither 0, 0.5 nor 1; correct it")
        winner, loser = ("jpg_0", "jpg_1") if label == 1 else ("jpg_1", "jpg_0")
        yield source.pair(
            text_of(row, "caption", where),
            image_of(row[winner], where, winner),
            image_of(row[loser], where, loser),
            where,
            row.get(OUR_FIELDS),
        )
