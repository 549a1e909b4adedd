"""The checkpoints in ComfyUI's folders, and its own copy of CLIP's tokenizer."""

from pathlib import Path

import comfy.utils
import folder_paths

from ...checkpoint_id import CheckpointId
from ...errors import InputError
from ...models.checkpoint import Checkpoint, load_checkpoint


def clip_tokenizer_folder() -> Path:
    """Return ComfyUI's own copy of CLIP's tokenizer, so that training needs no download."""
    return Path(comfy.utils.__file__).parent / "sd1_tokenizer"


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


def is_diffusion_model(name: str) -> bool:
    """Say whether a file of this name lies among the diffusion models, and none among the checkpoints."""
    found = [folder_paths.get_full_path(kind, name) for kind in ("diffusion_models", "checkpoints")]
    return found[0] is not None and found[1] is None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint with ComfyUI's tokenizer."""
    return load_checkpoint(path, tokenizer_folder=clip_tokenizer_folder())


def base_checkpoint(name: str) -> CheckpointId:
    """Return what a dataset records of the checkpoint that drew it: name, sha256 and family.

    Raises:
        InputError: there is no such checkpoint, or it is of a family that cannot be trained.
    """
    checkpoint = open_checkpoint(checkpoint_path(name))
    return CheckpointId(name=name, sha256=checkpoint.sha256, family=checkpoint.family)
