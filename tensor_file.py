"""Safetensors files: the same content gives the same bytes, checked before it counts as written; read whole or not.

The one reader of the pack: experts, base models, caches and training states are all read by it.
"""

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InputError, SafetyExpertsError
from .files import open_plain, write_atomically

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_READ_DTYPES = {name: dtype for dtype, name in _DTYPES.items()} | {
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as little-endian bytes, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
    with _checked(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read anew each time that they are asked for, and freed with their last use.

    The safetensors library maps the file instead, and what was read of a mapping counts as memory until it is closed.

    Args:
        path: stays open, so that what is read is this file even if another one takes its place.

    Raises:
        InputError: no such file, or it is truncated or not safetensors.
    """

    def __init__(self, path: str | os.PathLike):
        with _checked(path) as file:  # offsets, shapes and size of the file too
            self.metadata: dict[str, str] = file.metadata() or {}
        self._file = open(path, "rb")  # noqa: SIM115
        (length,) = struct.unpack("<Q", self._file.read(8))
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self._entries: dict[str, dict] = header
        self._start = 8 + length
        if unknown := [name for name, entry in header.items() if entry["dtype"] not in _READ_DTYPES]:
            dtype = header[unknown[0]]["dtype"]
            raise InputError(
                f"{path}: tensor {unknown[0]} has the type {dtype}, which is not read; save it as F16 or F32"
            )

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        if begin == end:
            return self.outline(name)
        data = bytearray(end - begin)
        self._file.seek(self._start + begin)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=_READ_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def outline(self, name: str, device: str = "cpu") -> Tensor:
        """Return an empty tensor of the same shape and type, such as on the meta device."""
        entry = self._entries[name]
        return torch.empty(entry["shape"], dtype=_READ_DTYPES[entry["dtype"]], device=device)

    def __contains__(self, name: object) -> bool:  # a mapping's own would read the tensor
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@contextlib.contextmanager
def _checked(path: str | os.PathLike) -> Iterator[safe_open]:
    try:
        open_plain(path, follow_links=True).close()  # of a pipe the library would wait for ever
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}; check the name") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; check the name and its rights") from error
    except ValueError as error:
        raise InputError("a file name holds a NUL character; check the name") from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no such file: {path}; check the name") from error
    except (SafetensorError, OSError) as error:
        # The library quotes what is in the header: texts of strangers, of any length.
        known = re.match(r"Error while deserializing header: [A-Za-z ]+", str(error))
        reason = known[0] if known else getattr(error, "strerror", None) or type(error).__name__
        raise InputError(
            f"{path} is truncated or not a safetensors file ({reason}); copy it again, or convert it to safetensors"
        ) from error


def _compare(written: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    found = TensorFile(written)
    same = found.keys() == tensors.keys() and found.metadata == dict(metadata)
    if not same or any(tensor_bytes(found[name]) != tensor_bytes(tensors[name]) for name in tensors):
        raise SafetyExpertsError(f"{path}: what was read back differs from what was written; check the disk")
