"""The experts in ComfyUI's loras folders."""

from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside


def expert_names() -> list[str]:
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def expert_path(name: str) -> Path:
    """Return the path of an entry of the loras folders.

    Raises:
        InputError: there is no such file.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise InputError(
            f"no expert {name!r} in ComfyUI's loras folders: put the file into models/loras or output/loras and press "
            "R, or choose another one"
        )
    return Path(path)


def fresh_expert_path(name: str) -> Path:
    """Return a path in `output/loras` that no file has yet: `<name>_00001_.safetensors`, `_00002_`, …

    The stock loader caches a file by its path, so an expert is never written over another one.

    Raises:
        InputError: the name is empty or leaves `output/loras`.
    """
    stem = name.strip().removesuffix(".safetensors")
    if not stem or stem.endswith(("/", "\\")):
        raise InputError("the expert's name is empty: give it a name such as my_expert")
    root = Path(folder_paths.get_output_directory()) / "loras"
    path_inside(root, stem)
    folder, file_name, counter, _, _ = folder_paths.get_save_image_path(stem, str(root))
    return Path(folder) / f"{file_name}_{counter:05}_.safetensors"


def expert_name(path: Path) -> str:
    """Return how an expert in `output/loras` is called in the loras folders; undoes `expert_path`."""
    return path.relative_to(Path(folder_paths.get_output_directory()) / "loras").as_posix()
