"""The files of judges: models/safety_judges, with a folder a classifier and Q16's vectors."""

from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside

KIND = "safety_judges"
_VECTOR_SUFFIXES = (".safetensors", ".json", ".p")

if KIND not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))


def _entries(is_wanted) -> list[str]:
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(KIND)):
        if root.is_dir():
            found |= {path.relative_to(root).as_posix() for path in root.rglob("*") if is_wanted(path)}
    return sorted(found)


def judge_folders() -> list[str]:
    """Return the folders of transformers models in models/safety_judges."""
    return _entries(lambda path: (path / "config.json").is_file())


def judge_files() -> list[str]:
    """Return the files in models/safety_judges that may hold Q16's vectors; models' own weights are left out."""
    return _entries(lambda path: path.suffix in _VECTOR_SUFFIXES and not (path.parent / "config.json").is_file())


def judge_path(name: str) -> Path:
    """Return the path of an entry of `judge_folders` or `judge_files`.

    Raises:
        InputError: it leaves the folder or is not there.
    """
    for root in folder_paths.get_folder_paths(KIND):
        path = path_inside(root, name)
        if name and path.exists():
            return path
    raise InputError(f"no {name!r} in ComfyUI's models/{KIND}: put it there and refresh the node")


def fresh_judge_path(name: str) -> Path:
    """Return a path in models/safety_judges that no file has yet: `<name>_00001_.safetensors`, `_00002_`, …

    Raises:
        InputError: the name is empty or leaves the folder.
    """
    stem = name.strip().removesuffix(".safetensors")
    if not stem or stem.endswith(("/", "\\")):
        raise InputError("the name is empty: give it one such as my_verifier")
    root = Path(folder_paths.get_folder_paths(KIND)[0])
    number = 1
    while (path := path_inside(root, f"{stem}_{number:05}_.safetensors")).exists():
        number += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
