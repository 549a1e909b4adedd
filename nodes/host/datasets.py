"""The preference datasets in ComfyUI's dataset folders."""

import os
from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside
from .command import told_by_command
from .file_state import file_state


def dataset_names() -> list[str]:
    """Return the preference datasets (folders with our dataset.json) under ComfyUI's dataset folders, sorted."""
    names = set()
    for root in folder_paths.get_folder_paths("datasets"):
        for folder, subfolders, files in os.walk(root):
            if "dataset.json" in files:
                names.add(Path(folder).relative_to(root).as_posix())
                subfolders.clear()
    if given := told_by_command("dataset"):
        names.add(given.name)
    return sorted(names)


def dataset_folder(name: str) -> Path:
    """Return the folder of an existing dataset, or where a new one of this name belongs.

    Raises:
        InputError: the name is empty or leaves the datasets folder.
    """
    given = told_by_command("dataset")
    if given and name == given.name:
        return given
    folders = []
    for root in folder_paths.get_folder_paths("datasets"):
        folder = path_inside(root, name.strip())
        if folder == Path(root).resolve():
            raise InputError(f"dataset_name {name!r} names no folder: give the dataset a name such as my_dataset")
        folders.append(folder)
    return next((folder for folder in folders if (folder / "dataset.json").is_file()), folders[0])


def dataset_name(folder: Path) -> str | None:
    """Return how a dataset's folder is called in the dataset folders, or None outside them; undoes `dataset_folder`."""
    for root in folder_paths.get_folder_paths("datasets"):
        if folder.resolve().is_relative_to(Path(root).resolve()):
            return folder.resolve().relative_to(Path(root).resolve()).as_posix()
    given = told_by_command("dataset")
    return given.name if given and given == folder else None


def dataset_state(name: str) -> str:
    """Return a value that changes whenever a dataset's pairs change on disk; cheap, nothing is read."""
    try:
        return file_state(dataset_folder(name) / "metadata.jsonl")
    except InputError:
        return "absent"
