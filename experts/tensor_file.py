"""Writing safetensors so that the same content gives the same bytes, checked before it counts as written."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, SafetyExpertsError
from ..files import write_atomically
from .expert import tensor_bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, read it back and compare every bit; nothing half-written stays.

    The safetensors library writes metadata in random order, so the header is made here.

    Raises:
        SafetyExpertsError: the disk is full or not writable, or what was read back differs.
    """
    # Wide types first keeps every tensor aligned, as the format asks.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_atomically(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                file.write(tensor_bytes(tensors[name]))
        _compare(temporary, tensors, metadata, Path(path))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file.

    Raises:
        InputError: no such file, or it is truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no such file: {path}; check the name") from error
    except SafetensorError as error:
        raise InputError(
            f"{path} is truncated or not a safetensors file ({error}); copy it again or convert it to safetensors"
        ) from error


def _compare(written: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    found, found_metadata = read_tensors(written)
    same = found.keys() == tensors.keys() and found_metadata == dict(metadata)
    if not same or any(tensor_bytes(found[name]) != tensor_bytes(tensors[name]) for name in tensors):
        raise SafetyExpertsError(f"{path}: what was read back differs from what was written; check the disk")
