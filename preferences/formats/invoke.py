"""invoke-training: a metadata.jsonl with two images and which of them is preferred."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ..dataset import PreferenceDataset, PreferencePair
from .folders import copy_image, read_json_lines
from .format import OUR_FIELDS, Format, FoundPair, Source, image_file, number_names, our_fields


def _read(source: Source) -> Iterator[FoundPair]:
    path = source.path / "metadata.jsonl" if source.path.is_dir() else source.path
    folder = source.images_folder()
    for where, row in read_json_lines(path):
        texts = [row.get(name) for name in ("prompt", "image_0", "image_1")]
        marks = [row.get("prefer_0"), row.get("prefer_1")]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(mark, bool) for mark in marks):
            raise InputError(f"{where}: wants prompt, image_0, image_1, prefer_0 and prefer_1 (true or false)")
        if marks[0] == marks[1]:
            source.skip("tie")
            continue
        prompt, *names = (str(text) for text in texts)
        if marks[1]:
            names.reverse()
        chosen, rejected = (image_file(folder, name, where) for name in names)
        yield source.pair(prompt, chosen, rejected, where, row.get(OUR_FIELDS))


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for name, pair in number_names(pairs):
            names = [f"images/{name}-0.png", f"images/{name}-1.png"]
            for path, target in zip(dataset.image_paths(pair), names, strict=True):
                copy_image(path, folder, target)
            row = {"image_0": names[0], "image_1": names[1], "prompt": pair.prompt, "prefer_0": True, "prefer_1": False}
            file.write(json.dumps(row | {OUR_FIELDS: our_fields(pair)}, ensure_ascii=False) + "\n")


FORMAT = Format(
    title="invoke-training",
    layout="metadata.jsonl: image_0, image_1, prompt, prefer_0, prefer_1; the images beside it",
    published="invoke-ai/invoke-training",
    read=_read,
    write=_write,
)
