"""Reading a safetensors file of several gigabytes one tensor at a time."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import sha256_of_file
from ..tensor_file import TensorFile


class WeightsFile(TensorFile):
    """A base model's safetensors file: its keys and shapes at once, its tensors when asked for.

    Raises:
        InputError: no such file, a pickle, or not a complete safetensors file.
    """

    def __init__(self, path: Path):
        if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
            raise InputError(
                f"{path} is a pickle, which can run code when it is read: load it in ComfyUI and write it anew with "
                "Save Checkpoint, then use that .safetensors file"
            )
        super().__init__(path)
        self.path = path

    def has_prefix(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self)

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors under `prefix`, their keys without it."""
        return {key[len(prefix) :]: self.shape(key) for key in self if key.startswith(prefix)}

    def tensor(self, key: str) -> Tensor:
        """Read one tensor.

        Raises:
            InputError: the file has no such key.
        """
        if key not in self:
            raise InputError(f"{self.path} lacks the weight {key}: the file is incomplete; download or save it again")
        return self[key]


def fill(
    model: nn.Module, read: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str, source: Path
) -> None:
    """Give a model made on the meta device its weights, one by one, frozen and in evaluation mode.

    Args:
        model: its parameters and persistent buffers are replaced.
        read: key of the model's state dict -> tensor of the same shape (or, for 1x1 convolutions, the same numbers).
        dtype, device: what the weights are converted to as they are read, so no second copy of the model exists.
        source: named in errors.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    weights = {}
    for key, expected in model.state_dict().items():
        tensor = read(key)
        if tensor.numel() != expected.numel():
            raise InputError(
                f"{source}: the weight for {key} has shape {list(tensor.shape)} instead of {list(expected.shape)}; "
                "the file is damaged or of a variant that cannot be trained"
            )
        weights[key] = tensor.to(device=device, dtype=dtype).reshape(expected.shape)
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(False).eval()


def cached_sha256(path: Path) -> str:
    """Return a file's sha256, computed once for as long as its size and time of change stay the same."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    return sha256_of_file(path)
