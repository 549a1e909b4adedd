"""What a dataset folder holds, and what is wrong with it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_usable, open_plain, path_inside
from .images import read_image
from .metadata_file import is_json
from .records import PreferencePair, find_dataset_file, parse_pair, read_info, refuse_links

Progress = Callable[[int, int], None]


def check_dataset(folder: Path, on_progress: Progress | None = None) -> list[str]:
    """Return everything wrong with a dataset folder, one line a problem, naming the file; nothing is changed.

    Args:
        on_progress: called with (pairs done, pairs in all); every image is decoded, which takes a while.

    Raises:
        InputError: there is no dataset in the folder.
    """
    problems = []
    check_usable(folder)
    refuse_links(folder)
    try:
        read_info(find_dataset_file(folder))
    except InputError as error:
        if not (folder / "dataset.json").is_file():
            raise
        problems.append(str(error))
    metadata = folder / "metadata.jsonl"
    lines = []
    if metadata.exists():
        with open_plain(metadata) as file:
            lines = file.read().split(b"\n")
    if lines and not is_json(lines[-1]) and lines.pop():
        problems.append(f"{metadata} line {len(lines) + 1}: was only half written; building on mends it")
    lines_of_ids: dict[str, int] = {}
    known_files: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if on_progress:
            on_progress(number, len(lines))
        if not line.strip():
            continue
        where = f"{metadata} line {number}"
        try:
            pair = parse_pair(line, where)
        except InputError as error:
            problems.append(str(error))
            continue
        first = lines_of_ids.setdefault(pair.id, number)
        if first != number:
            problems.append(f"{where}: id {pair.id} stands on line {first} too; remove one of the two lines")
        known_files |= {pair.chosen_file_name, pair.rejected_file_name}
        problems += _check_images(folder, pair, where)
    for path in sorted((folder / "images").glob("*.png")):
        if path.relative_to(folder).as_posix() not in known_files and not path.name.startswith("."):
            problems.append(f"{path}: belongs to no pair; build on to finish its pair, or delete it")
    return problems


def _check_images(folder: Path, pair: PreferencePair, where: str) -> list[str]:
    problems, images = [], []
    for name in (pair.chosen_file_name, pair.rejected_file_name):
        try:
            image = read_image(path_inside(folder, name))
        except InputError as error:
            problems.append(f"{error} (id {pair.id})")
            continue
        images.append(image)
        if image.size != (pair.width_px, pair.height_px):
            problems.append(
                f"{folder / name}: is {image.width}×{image.height} px, {where} says {pair.width_px}×{pair.height_px}; "
                "put the right image back, or correct width_px and height_px"
            )
    if len(images) == 2 and images[0].size == images[1].size and images[0].tobytes() == images[1].tobytes():
        problems.append(f"{folder / pair.chosen_file_name}: shows the same as the rejected image; drop the pair")
    return problems


def summarise_pairs(pairs: list[PreferencePair]) -> dict[str, Any]:
    """Count pairs by category, review, unsafe flags and size; `training` leaves out the dropped ones."""

    def count(values) -> dict[str, int]:
        return dict(Counter(str(value).lower() if value is not None else "unknown" for value in values).most_common())

    return {
        "pairs": len(pairs),
        "training": sum(pair.review != "dropped" for pair in pairs),
        "categories": count(name for pair in pairs for name in pair.categories),
        "review": count(pair.review or "none" for pair in pairs),
        "chosen_unsafe": count(pair.chosen_unsafe for pair in pairs),
        "rejected_unsafe": count(pair.rejected_unsafe for pair in pairs),
        "sizes_px": count(f"{pair.width_px}×{pair.height_px}" for pair in pairs),
    }
