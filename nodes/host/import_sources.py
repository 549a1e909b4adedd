"""Files and folders to import, in ComfyUI's input and datasets folders."""

from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside


def import_source(name: str) -> Path:
    """Return the file or folder that `input/…` or `datasets/…` names.

    Raises:
        InputError: it is named otherwise, leaves its folder, or is not there.
    """
    label, _, relative = name.strip().partition("/")
    roots = {"input": folder_paths.get_input_directory(), "datasets": folder_paths.get_folder_paths("datasets")[0]}
    if label not in roots or not relative.strip("/"):
        raise InputError("a source is named input/… or datasets/…: put it into ComfyUI's input or datasets folder")
    path = path_inside(roots[label], relative)
    if not path.exists():
        raise InputError(f"there is no {label}/… of this name; put it into ComfyUI's {label} folder, or check the name")
    return path
