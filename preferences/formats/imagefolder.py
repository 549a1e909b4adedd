"""Hugging Face's imagefolder with two image columns: metadata.jsonl with chosen_file_name and rejected_file_name."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ..dataset import PreferenceDataset, PreferencePair
from ..records import parse_pair
from .folders import copy_image, read_json_lines
from .format import Format, FoundPair, Source, image_file, our_fields

_PROMPTS = ("prompt", "caption", "text")


def _read(source: Source) -> Iterator[FoundPair]:
    path = source.path / "metadata.jsonl" if source.path.is_dir() else source.path
    folder = source.images_folder()
    for where, row in read_json_lines(path):
        names = [row.get(name) for name in ("chosen_file_name", "rejected_file_name")]
        prompts = [row[name] for name in _PROMPTS if name in row]
        if len(prompts) != 1 or not all(isinstance(text, str) for text in [*prompts, *names]):
            raise InputError(f"{where}: wants chosen_file_name, rejected_file_name and one of {', '.join(_PROMPTS)}")
        chosen, rejected = (image_file(folder, str(name), where) for name in names)
        yield source.pair(prompts[0], chosen, rejected, where, _our_fields(row, where))


def _our_fields(row: dict, where: str) -> str | None:
    """A line of a dataset of ours says everything in columns of its own."""
    if not {"id", "safe_prompt", "chosen_unsafe", "rejected_unsafe"} <= row.keys():
        return None
    return our_fields(parse_pair(json.dumps(row).encode(), where))


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            for path, name in zip(
                dataset.image_paths(pair), (pair.chosen_file_name, pair.rejected_file_name), strict=True
            ):
                copy_image(path, folder, name)
            file.write(pair.to_json() + "\n")


FORMAT = Format(
    title="Hugging Face imagefolder",
    layout="metadata.jsonl: chosen_file_name, rejected_file_name and prompt (or caption, text); the images beside it",
    published="the imagefolder builder of Hugging Face datasets",
    read=_read,
    write=_write,
)
