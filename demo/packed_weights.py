"""Trained weights in a few megabytes: coarse integers, one scale a row, Huffman-coded, inside a safetensors file.

A weight is rounded to a multiple of a fraction of its row's standard deviation, which costs about 4 bits each.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..files import write_atomically

FORMAT_VERSION = "1"


def round_rows(weight: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to int8 codes with one scale a row, so that weight ≈ codes · scale.

    Args:
        weight: [rows, …], float.
        step: the spacing of the codes, as a fraction of the row's standard deviation.

    Returns:
        The codes, int8 [rows, …], and the scales, float16 [rows].
    """
    rows = weight.float().flatten(1)
    largest = rows.abs().amax(dim=1)
    scale = torch.maximum(rows.square().mean(dim=1).sqrt() * step, largest / 127).clamp(min=1e-6).half()
    codes = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view(weight.shape), scale


def scale_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight that `round_rows` stands for, float32 of the codes' shape."""
    return (codes.float().flatten(1) * scale.float()[:, None]).view(codes.shape)


def save_packed(
    path: str | Path, parts: Mapping[str, tuple[Mapping[str, torch.Tensor], float]], metadata: Mapping[str, str]
) -> None:
    """Write the parts of a model to one file; vectors (biases, norms) are kept in float16.

    Args:
        path: the safetensors file to write.
        parts: part name -> (state dict, step of `round_rows`).
        metadata: strings to keep in the header beside the format.
    """
    tensors: dict[str, torch.Tensor] = {}
    shapes = {}
    for part, (state, step) in parts.items():
        for name, weight in sorted(state.items()):
            key = f"{part}.{name}"
            if weight.dim() < 2:
                tensors[key] = weight.half().contiguous()
                continue
            codes, scale = round_rows(weight, step)
            tensors[key] = torch.frombuffer(bytearray(_compress(codes.numpy().tobytes())), dtype=torch.uint8)
            tensors[f"{key}.scale"] = scale
            shapes[key] = list(weight.shape)
    header = {**metadata, "packed_format": FORMAT_VERSION, "packed_shapes": json.dumps(shapes)}
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, header)


def load_packed(path: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Read a file of `save_packed`: part name -> state dict in float16, and the metadata.

    Raises:
        InputError: the file is of another format or damaged.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
        if metadata.pop("packed_format", None) != FORMAT_VERSION:
            raise InputError(
                f"{path} is not a packed weights file of format {FORMAT_VERSION}; take the pack's own file"
            )
        shapes = json.loads(metadata.pop("packed_shapes"))
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key.removesuffix(".scale") in shapes and key not in shapes:
                continue
            tensor = file.get_tensor(key)
            if key in shapes:
                codes = _decompress(tensor.numpy().tobytes(), shapes[key], f"{path}, {key}")
                tensor = scale_rows(codes, file.get_tensor(f"{key}.scale")).half()
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor
    return parts, metadata


def _compress(data: bytes) -> bytes:
    # Neighbouring weights have nothing in common, so only the frequencies of the codes can be used.
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(data) + compressor.flush()


def _decompress(data: bytes, shape: list[int], where: str) -> torch.Tensor:
    try:
        codes = np.frombuffer(zlib.decompress(data, -15), dtype=np.int8)
        return torch.from_numpy(codes.reshape(shape).copy())
    except (zlib.error, ValueError) as error:
        raise InputError(f"{where}: damaged weights ({error}); restore the file from the repository") from None
