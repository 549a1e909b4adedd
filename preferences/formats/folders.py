"""What the formats of files in folders share: captions beside images, and our own fields in a file beside them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import open_plain, path_inside, read_stored, read_text
from ..dataset import PreferenceDataset, PreferencePair
from .format import OUR_FIELDS, FoundPair, Source, image_file, number_names, our_fields

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SIDECAR = f"{OUR_FIELDS}.jsonl"


def images_of(folder: Path, where: str) -> dict[str, str]:
    """Return name without suffix -> file name of every image in a folder, sorted.

    Raises:
        InputError: there is no such folder, or two images differ in their suffix only.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; {where}")
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(f"{path}: another image has this name but for its suffix; remove one of them")
            found[path.stem] = path.name
    return found


def pairs_of_two_folders(source: Source, chosen: Path, rejected: Path) -> Iterator[FoundPair]:
    """Yield the pairs of images that have one name in two folders; the caption is the .txt file of either.

    Raises:
        InputError: a folder or a caption is missing, or no name stands in both.
    """
    where = "the format wants one folder of chosen and one of rejected images"
    winners, losers = images_of(chosen, where), images_of(rejected, where)
    ours = read_our_fields(source.path)
    for _ in winners.keys() ^ losers.keys():
        source.skip("image in one of the two folders only")
    if not winners.keys() & losers.keys():
        raise InputError(
            f"{source.path}: no image of {chosen.name} has its partner in {rejected.name}; check the names"
        )
    for stem in sorted(winners.keys() & losers.keys()):
        place = f"{chosen / winners[stem]}"
        prompt = read_caption((chosen / f"{stem}.txt", rejected / f"{stem}.txt"), place)
        yield source.pair(
            prompt,
            image_file(chosen, winners[stem], place),
            image_file(rejected, losers[stem], place),
            place,
            ours.get(stem),
        )


def read_caption(candidates: tuple[Path, ...], where: str) -> str:
    """Return the text of the first caption file that is there.

    Raises:
        InputError: there is none.
    """
    for path in candidates:
        if path.is_file():
            return read_text(path).strip()
    raise InputError(f"{where}: has no caption; put the prompt into {candidates[0].name} beside it")


def write_our_fields(folder: Path, lines: Iterable[tuple[str, str]]) -> None:
    """Write what the format has no place for: (name of the pair, JSON of our_fields) a line."""
    with open(folder / _SIDECAR, "w", encoding="utf-8", newline="\n") as file:
        for name, text in lines:
            file.write(json.dumps({"name": name, OUR_FIELDS: text}, ensure_ascii=False) + "\n")


def read_our_fields(folder: Path) -> dict[str, str]:
    """Return name -> JSON of our_fields; empty where the folder is no export of ours.

    Raises:
        InputError: a line is not of that form.
    """
    path = folder / _SIDECAR
    if not path.exists():
        return {}
    found = {}
    with open_plain(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                name, text = record["name"], record[OUR_FIELDS]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(
                    f"{path} line {number}: is not of the form an export writes; delete the file"
                ) from None
            if not isinstance(name, str) or not isinstance(text, str):
                raise InputError(f"{path} line {number}: is not of the form an export writes; delete the file")
            found[name] = text
    return found


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) of every line of a JSONL file that the user named.

    Raises:
        InputError: there is no such file, or a line is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number}: is no JSON object; correct the line")
        yield f"{path} line {number}", record


def write_two_folders(
    dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path, chosen: str, rejected: str
) -> None:
    """Write the images of either side into a folder of its own, under equal names, each with its caption."""
    for name, pair in number_names(pairs):
        for side, path in zip((chosen, rejected), dataset.image_paths(pair), strict=True):
            copy_image(path, folder, f"{side}/{name}.png")
            (folder / side / f"{name}.txt").write_text(pair.prompt, encoding="utf-8", newline="")
    write_our_fields(folder, ((name, our_fields(pair)) for name, pair in number_names(pairs)))


def copy_image(path: Path, folder: Path, name: str) -> None:
    """Copy an image of a dataset into an export; a link or a pipe is refused."""
    target = path_inside(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(read_stored(path))
