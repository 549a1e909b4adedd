"""GGUF models (ComfyUI-GGUF's loaders): weights stay packed and are unpacked anew in every call."""

from torch import Tensor


def is_gguf(patcher) -> bool:
    """Say whether a MODEL is one, by the names of classes: its pack need not be there."""
    if "gguf" in type(patcher).__name__.lower():
        return True
    return any(_is_of_gguf(weight) for weight in patcher.model.diffusion_model.parameters())


def ordinary(value: Tensor) -> Tensor:
    """Return GGUF's numbers that are not packed as torch's own: their class refuses to be copied."""
    return value.as_subclass(Tensor) if _is_of_gguf(value) else value


def _is_of_gguf(value: Tensor) -> bool:
    return "ggml" in type(value).__name__.lower()
