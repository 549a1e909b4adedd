"""Q16's two vectors on disk: ours in safetensors, plain numbers in JSON, and the published pickle, never unpickled."""

import hashlib
import json
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import InputError
from ...files import open_plain
from ...tensor_file import read_tensors, write_tensors

# `data/ViT-L-14/prompts.p` of ml-research/Q16; the same bytes in HELM, Diffusion-MU-Attack, unsafe-diffusion, PSAlign.
PUBLISHED_SHA256 = "9b6c411824c2f64e0f847aa3c9f2b15b8e3a6c75e0efd82f2f672670c97ccad5"
_PUBLISHED_SHAPE = (2, 768)
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Q16Vectors:
    """The two vectors of a file.

    Args:
        weights: [2, d] float32; row 0 plain, row 1 inappropriate. Of any length.
        sha256: of the numbers.
        probe: what the CLIP they were fitted with makes of `probe_image` [d]; None where nobody knows.
        metadata: how they were fitted.
    """

    path: Path
    weights: Tensor
    sha256: str
    probe: Tensor | None = None
    metadata: dict[str, str] | None = None


def probe_image() -> Image.Image:
    """Return a fixed picture; two CLIPs that embed it alike are the same CLIP, whoever loads it."""
    y, x = np.mgrid[0:224, 0:224]
    return Image.fromarray(np.stack([x, y, (x * y) // 224], axis=-1).astype(np.uint8))


def read_vectors(path: Path, published_sha256: str = PUBLISHED_SHA256) -> Q16Vectors:
    """Read the two vectors.

    Args:
        published_sha256: the only pickle that is looked at.

    Raises:
        InputError: no such file, another kind of file, or it holds anything but two vectors of finite numbers.
    """
    readers: dict[str, Callable[[], tuple[Tensor, Tensor | None, dict]]] = {
        ".safetensors": lambda: _read_safetensors(path),
        ".json": lambda: (_read_json(path), None, {}),
        ".p": lambda: (_read_published(path, published_sha256), None, {}),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: vectors are read from .safetensors and .json, and from Q16's prompts.p")
    weights, probe, metadata = readers[path.suffix.lower()]()
    if weights.ndim != 2 or len(weights) != 2:
        raise InputError(f"{path}: holds numbers of shape {list(weights.shape)}, not two vectors")
    if not weights.isfinite().all() or (weights.norm(dim=1) == 0).any():
        raise InputError(f"{path}: a vector holds no number, or only zeros; take the file from its source again")
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    return Q16Vectors(path, weights, digest, probe, metadata)


def write_vectors(path: Path, weights: Tensor, probe: Tensor | None, metadata: dict[str, str]) -> None:
    """Write two vectors [2, d] as safetensors, with the probe's embedding [d] where it is known.

    Raises:
        SafetyExpertsError: the file cannot be written.
    """
    tensors = {"vectors": weights.float().contiguous()}
    if probe is not None:
        tensors["probe"] = probe.float().contiguous()
    write_tensors(path, tensors, metadata)


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None, dict[str, str]]:
    tensors, metadata = read_tensors(path)
    probe = tensors.pop("probe", None)
    if len(tensors) != 1:
        raise InputError(f"{path}: holds {len(tensors)} tensors; expected one, the two vectors")
    (weights,) = tensors.values()
    return weights.float(), None if probe is None else probe.float(), metadata


def _read_json(path: Path) -> Tensor:
    try:
        return torch.tensor(json.loads(_read_bytes(path)), dtype=torch.float32)
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path}: not a JSON list of two lists of numbers") from None


def _read_published(path: Path, expected_sha256: str) -> Tensor:
    """Take the numbers out of the published pickle by walking its opcodes; nothing of it is ever run."""
    data = _read_bytes(path)
    if hashlib.sha256(data).hexdigest() != expected_sha256:
        raise InputError(
            f"{path}: is not the file that Q16 published (sha256 {expected_sha256[:12]}…), and pickles stay closed; "
            "save the numbers as JSON or safetensors"
        )
    num_numbers = int(np.prod(_PUBLISHED_SHAPE))
    found = [value for _, value, _ in pickletools.genops(data) if isinstance(value, bytes)]
    found = [value for value in found if len(value) == 2 * num_numbers]
    if len(found) != 1:
        raise InputError(f"{path}: does not hold {num_numbers} half-precision numbers")
    numbers = struct.unpack(f"<{num_numbers}e", found[0])
    return torch.tensor(numbers, dtype=torch.float32).reshape(_PUBLISHED_SHAPE)


def _read_bytes(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; check the name") from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path}: is larger than two vectors can be; check the name")
    return data
