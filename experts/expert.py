"""An expert: one LoRA that turns a model away from some categories, with what is known about how it was made."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from ..tensor_file import tensor_bytes
from .keys import read_lora_keys

METADATA_KEY = "safety_experts"
FORMAT_VERSION = 1


@dataclass(frozen=True, repr=False, eq=False)
class LoraLayer:
    """A low-rank change of one weight: ΔW = alpha / rank · up @ down.

    Args:
        down: A, [r, in] or [r, in, kh, kw] for a convolution.
        up: B, [out, r] or [out, r, 1, 1].
        alpha: as in the file; scale is alpha / rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes: [out, in] or [out, in, kh, kw]."""
        return (self.up.shape[0], *self.down.shape[1:])

    @classmethod
    def from_matrices(cls, up: Tensor, down: Tensor, weight_shape: Sequence[int]) -> "LoraLayer":
        """Return up [out, r] @ down [r, in·kh·kw] as a float32 layer of a weight's shape, alpha = r."""
        rank, (out, *inner) = down.shape[0], weight_shape
        shaped_down = down.float().reshape(rank, *inner).contiguous()
        shaped_up = up.float().reshape(out, rank, *[1] * (len(inner) - 1)).contiguous()
        return cls(shaped_down, shaped_up, float(rank))

    def delta(self) -> Tensor:
        """Return ΔW, dense, float32, in `weight_shape`."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.weight_shape)

    def __repr__(self) -> str:
        return f"LoraLayer({list(self.weight_shape)}, rank {self.rank}, alpha {self.alpha:g})"


@dataclass(repr=False, eq=False)
class Expert:
    """Layers by kohya module name (`lora_unet_…_attn1_to_q`), and the facts that travel in the file's metadata.

    Args:
        layers: what it changes.
        info: the `safety_experts` metadata (categories, recipe, base checkpoint, …; for merges parents, method, …).
        name: for messages; usually the file's name without its ending.
        file_sha256: of the file it was read from, if there was one.
    """

    layers: Mapping[str, LoraLayer]
    info: dict = field(default_factory=dict)
    name: str = "expert"
    file_sha256: str | None = None

    @property
    def categories(self) -> list[str]:
        return list(self.info.get("categories", []))

    def state_dict(self) -> dict[str, Tensor]:
        """Return kohya tensors: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha` (float32, [])."""
        return {key: tensor for name, layer in self.layers.items() for key, tensor in _layer_tensors(name, layer)}

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, name: str = "expert"
    ) -> "Expert":
        """Build an expert from LoRA tensors in any spelling that `keys` knows.

        Args:
            tensors: as read from a file.
            metadata: the file's string metadata; without ours the expert has no categories.
            name: named in errors.

        Raises:
            InputError: keys match nothing known, a layer is incomplete, or the metadata is not ours to read.
        """
        layers = {}
        for module, parts in read_lora_keys(tensors, metadata or {}, name).items():
            if parts.down.shape[0] != parts.up.shape[1]:
                raise InputError(
                    f"{name}: layer {module} has rank {parts.down.shape[0]} in its down part but {parts.up.shape[1]} "
                    "in its up part; the file is damaged, use another copy"
                )
            layers[module] = LoraLayer(parts.down, parts.up, parts.alpha)
        return cls(layers, read_info(metadata or {}, name), name)

    def tensors_sha256(self) -> str:
        """Return a hash of the layers alone: the same for every spelling, whatever the metadata says."""
        digest = hashlib.sha256()
        for name in sorted(self.layers, key=lambda name: f"{name}."):  # layer by layer, and as sorted keys would be
            for key, tensor in sorted(_layer_tensors(name, self.layers[name])):
                digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def origin(self) -> dict:
        """Return how the metadata of what is made from this expert names it: name, hashes and categories."""
        return {
            "name": self.name,
            "sha256": self.file_sha256,
            "tensors_sha256": self.tensors_sha256(),
            "categories": self.categories,
        }

    def __repr__(self) -> str:
        return f"Expert({self.name!r}, {len(self.layers)} layers, categories {self.categories})"


def _layer_tensors(name: str, layer: LoraLayer) -> list[tuple[str, Tensor]]:
    return [
        (f"{name}.lora_down.weight", layer.down),
        (f"{name}.lora_up.weight", layer.up),
        (f"{name}.alpha", torch.tensor(layer.alpha, dtype=torch.float32)),
    ]


def read_info(metadata: Mapping[str, str], name: str) -> dict:
    """Return the `safety_experts` metadata, empty for other people's files.

    Raises:
        InputError: it is not JSON, or a newer version of this pack wrote it.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        info = json.loads(text)
        version = info["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{name}: metadata {METADATA_KEY!r} is damaged ({error}); use another copy") from error
    if version != FORMAT_VERSION:
        raise InputError(f"{name}: expert format {version!r}, this version reads {FORMAT_VERSION}; update the pack")
    return info
