"""The one place that turns ComfyUI's objects into the library's: folders, device, progress, interrupts.

Other node files ask here for paths and devices, so every path that comes from a workflow is checked in one place.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ..errors import InputError
from ..files import path_inside
from ..models.checkpoint import load_checkpoint

PROMPT_FILE_SUFFIXES = (".jsonl", ".csv", ".yaml", ".yml")
PICTURE_SIZE_PX = 768
PICTURE_INTERVAL_SECONDS = 1.0


class Progress:
    """A node's progress bar, with an optional live picture; every call stops the node when the user cancelled."""

    def __init__(self, total: int = 1):
        self._bar = comfy.utils.ProgressBar(total)
        self._next_picture_seconds = 0.0

    def advance(self, count: int) -> None:
        self.show(self._bar.current + count)

    def show(self, value: int, total: int | None = None, draw: Callable[[], Image.Image] | None = None) -> None:
        """Show `value` of `total`; `draw` makes the picture and is called once a second, and at the end."""
        stop_if_cancelled()  # the bar itself asks only every half percent
        preview = None
        if draw and (time.monotonic() >= self._next_picture_seconds or value == (total or self._bar.total)):
            self._next_picture_seconds = time.monotonic() + PICTURE_INTERVAL_SECONDS
            preview = ("JPEG", draw(), PICTURE_SIZE_PX)
        self._bar.update_absolute(value, total, preview)

    def picture(self, draw: Callable[[], Image.Image]) -> None:
        self.show(self._bar.current, draw=draw)


class PatientProgress(Progress):
    """Progress for work that has something to save: it remembers a cancel instead of raising it at once."""

    def __init__(self, total: int = 1):
        super().__init__(total)
        self._interrupt: comfy.model_management.InterruptProcessingException | None = None

    def show(self, value: int, total: int | None = None, draw: Callable[[], Image.Image] | None = None) -> None:
        try:
            super().show(value, total, draw)
        except comfy.model_management.InterruptProcessingException as interrupt:  # raising it has cleared the flag
            self._interrupt = interrupt

    def is_cancelled(self) -> bool:
        return self._interrupt is not None or comfy.model_management.processing_interrupted()

    def raise_cancel(self) -> None:
        """Now that everything is saved, raise the cancel there was."""
        if self._interrupt is not None:
            raise self._interrupt
        stop_if_cancelled()


def stop_if_cancelled() -> None:
    """Raise ComfyUI's InterruptProcessingException when the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


@contextlib.contextmanager
def training_on_device() -> Iterator[torch.device]:
    """Free ComfyUI's models, leave inference mode, and yield the device to train on.

    Everything that takes part in the backward pass has to be made inside: ComfyUI runs nodes under
    `torch.inference_mode()`, and tensors made there can never be saved for backward.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield comfy.model_management.get_torch_device()
    finally:
        comfy.model_management.soft_empty_cache()


def clip_tokenizer_folder() -> Path:
    """Return ComfyUI's own copy of CLIP's tokenizer, so that training needs no download."""
    return Path(comfy.utils.__file__).parent / "sd1_tokenizer"


# --- datasets ---


def dataset_names() -> list[str]:
    """Return the preference datasets (folders with our dataset.json) under ComfyUI's dataset folders, sorted."""
    names = set()
    for root in folder_paths.get_folder_paths("datasets"):
        for folder, subfolders, files in os.walk(root):
            if "dataset.json" in files:
                names.add(Path(folder).relative_to(root).as_posix())
                subfolders.clear()
    return sorted(names)


def dataset_folder(name: str) -> Path:
    """Return the folder of an existing dataset, or where a new one of this name belongs.

    Raises:
        InputError: the name is empty or leaves the datasets folder.
    """
    folders = []
    for root in folder_paths.get_folder_paths("datasets"):
        folder = path_inside(root, name.strip())
        if folder == Path(root).resolve():
            raise InputError(f"dataset_name {name!r} names no folder: give the dataset a name such as my_dataset")
        folders.append(folder)
    return next((folder for folder in folders if (folder / "dataset.json").is_file()), folders[0])


def dataset_state(name: str) -> str:
    """Return a value that changes whenever a dataset's pairs change on disk; cheap, nothing is read."""
    try:
        return file_state(dataset_folder(name) / "metadata.jsonl")
    except InputError:
        return "absent"


class OwnWrites:
    """Fingerprints of nodes that write to a dataset: the same before and after their own writing.

    A plain fingerprint of the folder would change by the node's own work, and the next queue would run the node and
    everything behind it (a training run!) again. Edits by anybody else still change it.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, int]] = {}  # dataset -> (state on disk, fingerprint)
        self._changes = itertools.count()

    def fingerprint(self, name: str) -> int:
        """Return a number that is new whenever somebody else changed the dataset since we last looked."""
        state = dataset_state(name)
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, next(self._changes))
        return self._known[name][1]

    def written(self, name: str) -> None:
        """Take the dataset's present state as our own work."""
        _, fingerprint = self._known.get(name, ("", next(self._changes)))
        self._known[name] = (dataset_state(name), fingerprint)


own_writes = OwnWrites()


# --- prompt files ---


def _prompt_roots() -> dict[str, Path]:
    return {
        "input": Path(folder_paths.get_input_directory()),
        "datasets": Path(folder_paths.get_folder_paths("datasets")[0]),
    }


def prompt_files() -> list[str]:
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
                if name.endswith(PROMPT_FILE_SUFFIXES) and not name.startswith(".") and name != "metadata.jsonl"
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


def file_state(path: Path) -> str:
    """Return a value that changes when a file is replaced or edited; "absent" when it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return "absent"
    return f"{stat.st_mtime_ns}-{stat.st_size}"


# --- checkpoints ---


def checkpoint_names() -> list[str]:
    return folder_paths.get_filename_list("checkpoints")


def checkpoint_path(name: str) -> Path:
    """Return the path of an entry of the checkpoints folders.

    Raises:
        InputError: there is no such checkpoint.
    """
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise InputError(f"no checkpoint {name!r} in ComfyUI's checkpoints folders: choose another one")
    return Path(path)


def base_checkpoint(name: str) -> dict[str, str]:
    """Return what a dataset records of the checkpoint that drew it: name, sha256 and family.

    Raises:
        InputError: there is no such checkpoint, or it is of a family that cannot be trained.
    """
    checkpoint = load_checkpoint(checkpoint_path(name), tokenizer_folder=clip_tokenizer_folder())
    return {"name": name, "sha256": checkpoint.sha256, "family": checkpoint.family}


# --- experts ---


def expert_names() -> list[str]:
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def expert_path(name: str) -> Path:
    """Return the path of an entry of the loras folders.

    Raises:
        InputError: there is no such file.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise InputError(f"no expert {name!r} in ComfyUI's loras folders: refresh the node and choose another one")
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


def previous_expert_path(path: Path) -> Path:
    """Return the path `fresh_expert_path` gave before this one."""
    prefix, counter, _ = path.name.rsplit("_", 2)
    return path.with_name(f"{prefix}_{int(counter) - 1:05}_.safetensors")


def expert_name(path: Path) -> str:
    """Return how an expert in `output/loras` is called in the loras folders; undoes `expert_path`."""
    return path.relative_to(Path(folder_paths.get_output_directory()) / "loras").as_posix()
