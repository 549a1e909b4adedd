"""HPDv2: train.json with several images a prompt and which of them people preferred."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ...files import read_text
from ..dataset import PreferenceDataset, PreferencePair
from .folders import copy_image
from .format import OUR_FIELDS, Format, FoundPair, Source, image_file, number_names, our_fields


def _read(source: Source) -> Iterator[FoundPair]:
    path = source.path / "train.json" if source.path.is_dir() else source.path
    folder = source.images_folder()
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is no JSON; give HPDv2's train.json") from None
    if not isinstance(entries, list):
        raise InputError(f"{path}: is no list of prompts; give HPDv2's train.json")
    for number, entry in enumerate(entries, start=1):
        where = f"{path} entry {number}"
        prompt, names, marks, ours = _fields(entry, where)
        if len(set(marks)) < 2:
            source.skip("tie")
        # Two images in the published file; with more, every preferred one against every other.
        for winner, loser in itertools.product(range(len(names)), repeat=2):
            if marks[winner] > marks[loser]:
                chosen, rejected = (image_file(folder, names[index], where) for index in (winner, loser))
                yield source.pair(prompt, chosen, rejected, where, ours)


def _fields(entry: object, where: str) -> tuple[str, list[str], list[int], str | None]:
    if isinstance(entry, dict):
        prompt, names, marks = (entry.get(name) for name in ("prompt", "file_path", "human_preference"))
        ours = entry.get(OUR_FIELDS)
        if (
            isinstance(prompt, str)
            and isinstance(names, list)
            and isinstance(marks, list)
            and len(names) == len(marks) <= 16
            and all(isinstance(name, str) for name in names)
            and all(mark in (0, 1) for mark in marks)
            and (ours is None or isinstance(ours, str))
        ):
            return prompt, names, marks, ours
    raise InputError(f"{where}: wants prompt, file_path (names) and human_preference (0 or 1 each); correct it")


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    entries = []
    for name, pair in number_names(pairs):
        names = [f"images/{name}-0.png", f"images/{name}-1.png"]
        for path, target in zip(dataset.image_paths(pair), names, strict=True):
            copy_image(path, folder, target)
        entry = {"human_preference": [1, 0], "prompt": pair.prompt, "file_path": names, OUR_FIELDS: our_fields(pair)}
        entries.append(entry)
    (folder / "train.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")


FORMAT = Format(
    title="HPDv2",
    layout="train.json: prompt, file_path, human_preference; the images in a folder",
    published="ymhao/HPDv2 on Hugging Face",
    read=_read,
    write=_write,
)
