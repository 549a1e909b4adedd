"""Where ComfyUI computes, and how a node trains there."""

import contextlib
from collections.abc import Iterator

import comfy.model_management
import torch


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
