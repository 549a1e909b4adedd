"""SimpleTuner: a backend of preferred images and one of rejected ones, matched by file name."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError
from ...files import path_inside, read_text
from ..dataset import PreferenceDataset, PreferencePair
from .folders import pairs_of_two_folders, write_two_folders
from .format import Format, FoundPair, Source

_CONFIG = "multidatabackend.json"


def _read(source: Source) -> Iterator[FoundPair]:
    chosen, rejected = _folders(source.path)
    return pairs_of_two_folders(source, chosen, rejected)


def _folders(folder: Path) -> tuple[Path, Path]:
    """Return the folders of the backend with conditioning data and of its conditioning backend."""
    config = folder / _CONFIG
    if not config.exists():
        return folder / "preferred", folder / "rejected"
    try:
        backends = json.loads(read_text(config))
        by_id = {backend["id"]: backend for backend in backends}
        (preferred,) = (backend for backend in backends if backend.get("conditioning_data"))
        rejected = by_id[preferred["conditioning_data"]]
        names = [backend["instance_data_dir"] for backend in (preferred, rejected)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{config}: wants one backend whose conditioning_data names the backend of the rejected images"
        ) from None
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{config}: instance_data_dir is no text; give the name of a folder beside it")
    return path_inside(folder, names[0]), path_inside(folder, names[1])


def _write(dataset: PreferenceDataset, pairs: Sequence[PreferencePair], folder: Path) -> None:
    write_two_folders(dataset, pairs, folder, "preferred", "rejected")
    shared = {"type": "local", "caption_strategy": "textfile", "resolution_type": "pixel", "crop": False}
    backends = [
        {"id": "preferred", "dataset_type": "image", "instance_data_dir": "preferred", "conditioning_data": "rejected"},
        {
            "id": "rejected",
            "dataset_type": "conditioning",
            "conditioning_type": "reference_strict",
            "instance_data_dir": "rejected",
        },
    ]
    text = json.dumps([backend | shared for backend in backends], indent=2)
    (folder / _CONFIG).write_text(text, encoding="utf-8")


FORMAT = Format(
    title="SimpleTuner",
    layout="folders preferred and rejected, equal file names, captions as .txt, multidatabackend.json",
    published="bghira/SimpleTuner, conditioning_type reference_strict",
    read=_read,
    write=_write,
)
