"""Which checkpoint a node that trains works on."""

from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from ..preferences.dataset import PreferenceDataset
from . import host

OF_DATASET = "(the one that drew the dataset)"


def find(choice: str, dataset: PreferenceDataset) -> Path:
    """Return the path of the checkpoint chosen in a `sockets.checkpoint_input` that offers OF_DATASET.

    Raises:
        InputError: the dataset's own checkpoint is not there.
        SafetyExpertsError: it is another file by now.
    """
    return _base_of(dataset) if choice == OF_DATASET else host.checkpoint_path(choice)


def _base_of(dataset: PreferenceDataset) -> Path:
    """Return the path of the checkpoint that drew the dataset, if it is still the same file."""
    name = dataset.info.base_checkpoint.name
    if dataset.info.base_checkpoint.patches:
        raise InputError(
            f"the dataset was drawn by {name} with a LoRA on it: connect that MODEL with its CLIP and VAE, or choose "
            "the bare checkpoint in `checkpoint`"
        )
    if dataset.info.base_checkpoint.files or host.is_diffusion_model(name):
        raise InputError(
            f"the dataset was drawn by {name}, which is no all-in-one checkpoint: connect that MODEL with its CLIP and "
            "VAE, or choose a checkpoint in `checkpoint`"
        )
    try:
        path = host.checkpoint_path(name)
    except InputError as error:
        raise InputError(
            f"the checkpoint that drew the dataset, {name!r}, is not in ComfyUI's checkpoints folders: "
            "put it there, choose one in `checkpoint`, or connect the MODEL with its CLIP and VAE"
        ) from error
    if not host.base_checkpoint(name).is_same_model(dataset.info.base_checkpoint):
        raise SafetyExpertsError(
            f"{name} is no longer the file that drew the dataset: choose it in `checkpoint` to train on it all the same"
        )
    return path
