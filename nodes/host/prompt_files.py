"""The prompt files in ComfyUI's input and datasets folders."""

import os
from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside

PAIR_FILE_SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")
UNSAFE_FILE_SUFFIXES = (".csv", ".txt")


def _prompt_roots() -> dict[str, Path]:
    return {
        "input": Path(folder_paths.get_input_directory()),
        "datasets": Path(folder_paths.get_folder_paths("datasets")[0]),
    }


def prompt_files(suffixes: tuple[str, ...] = PAIR_FILE_SUFFIXES) -> list[str]:
    """Return the prompt files in the input and datasets folders, as `input/…` and `datasets/…`."""
    found = []
    for label, root in _prompt_roots().items():
        for folder, subfolders, files in os.walk(root):
            is_dataset = "dataset.json" in files  # its images are many, and none is a prompt file
            subfolders[:] = [] if is_dataset else sorted(name for name in subfolders if not name.startswith("."))
            relative = Path(folder).relative_to(root)
            found += [
                (label / relative / name).as_posix()
                for name in sorted(files)
                if name.endswith(suffixes) and not name.startswith(".") and name != "metadata.jsonl"
            ]
    return found


def prompt_file(name: str) -> Path:
    """Return the path of an entry of `prompt_files`.

    Raises:
        InputError: it leaves its folder or is not there.
    """
    label, _, relative = name.partition("/")
    root = _prompt_roots().get(label)
    if root is None or not relative:
        raise InputError(f"prompt file {name!r}: choose a file of the input or datasets folder")
    path = path_inside(root, relative)
    if not path.is_file():
        raise InputError(f"no prompt file {name}: put it into ComfyUI's input folder and refresh the node")
    return path
