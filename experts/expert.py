"""An expert: one LoRA that turns a model away from some categories, with what is known about how it was made."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from ..tensor_file import tensor_bytes
from .info import ExpertInfo, Parent, read_info
from .keys import LoraTensors, read_lora_keys

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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

    def factors(self, dtype: torch.dtype = torch.float32, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return (up [out, r], down [r, in·kh·kw]) with up @ down = weight · ΔW."""
        return self.up.to(dtype).flatten(1) * (weight * self.scale), self.down.to(dtype).flatten(1)

    def delta(self) -> Tensor:
        """Return ΔW, dense, float32, in `weight_shape`."""
        up, down = self.factors()
        return (up @ down).reshape(self.weight_shape)

    def __repr__(self) -> str:
        return f"LoraLayer({list(self.weight_shape)}, rank {self.rank}, alpha {self.alpha:g})"


@dataclass(frozen=True, repr=False, eq=False)
class Expert:
    """Layers by kohya module name (`lora_unet_…_attn1_to_q`), and the facts that travel in the file's metadata.

    Args:
        layers: what it changes.
        info: what is known of it (categories, base checkpoint, how it was made, …).
        name: for messages; usually the file's name without its ending.
        file_sha256: of the file it was read from, if there was one.
    """

    layers: Mapping[str, LoraLayer]
    info: ExpertInfo = field(default_factory=ExpertInfo)
    name: str = "expert"
    file_sha256: str | None = None

    @property
    def categories(self) -> list[str]:
        return list(self.info.categories)

    def state_dict(self) -> dict[str, Tensor]:
        """Return kohya tensors: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha` (float32, [])."""
        return {key: tensor for name, layer in self.layers.items() for key, tensor in layer_tensors(name, layer)}

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
            InputError: keys match nothing known, a layer cannot be used, or the metadata is not ours to read.
        """
        found = read_lora_keys(tensors, metadata or {}, name)
        layers = {module: checked_layer(parts, module, name) for module, parts in found.items()}
        return cls(layers, read_info(metadata or {}, name), name)

    def tensors_sha256(self) -> str:
        """Return a hash of the layers alone: the same for every spelling, whatever the metadata says."""
        digest = hashlib.sha256()
        for name in sorted(self.layers, key=lambda name: f"{name}."):  # layer by layer, and as sorted keys would be
            for key, tensor in sorted(layer_tensors(name, self.layers[name])):
                digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def as_parent(self, weight: float | None = None, tensors_sha256: str | None = None) -> Parent:
        """Return how the metadata of what is made from this expert names it.

        Args:
            tensors_sha256: its own, where it was computed already; it takes a pass over all layers.
        """
        return Parent(
            name=self.name,
            sha256=self.file_sha256,
            tensors_sha256=tensors_sha256 or self.tensors_sha256(),
            categories=tuple(self.categories),
            weight=weight,
        )

    def __repr__(self) -> str:
        return f"Expert({self.name!r}, {len(self.layers)} layers, categories {self.categories})"


def checked_layer(parts: LoraTensors, module: str, source: str) -> LoraLayer:
    """Return the parts of a layer in a file as a layer.

    Raises:
        InputError: what `layer_problem` finds.
    """
    layer = LoraLayer(parts.down, parts.up, parts.alpha)
    if problem := layer_problem(layer):
        raise InputError(f"{source}: layer {module} {problem}")
    return layer


def layer_problem(layer: LoraLayer) -> str | None:
    """Return why a layer is no low-rank change that can be used, with what to do; None where it is one.

    Tensors on the meta device are judged by type and shape alone.
    """
    down, up = layer.down, layer.up
    damaged = "; the file is damaged, use another copy"
    for tensor in (down, up):
        if tensor.dtype not in _DTYPES:
            return f"has the type {str(tensor.dtype).removeprefix('torch.')}; save it as F16 or F32"
    if down.ndim not in (2, 4) or up.ndim < 2 or any(size != 1 for size in up.shape[2:]):
        return f"has the shapes {list(down.shape)} and {list(up.shape)}, which are none of a LoRA{damaged}"
    if down.shape[0] != up.shape[1]:
        return f"has rank {down.shape[0]} in its down part but {up.shape[1]} in its up part{damaged}"
    if not down.numel() or not up.numel():
        return f"is empty: its shapes are {list(down.shape)} and {list(up.shape)}{damaged}"
    if not math.isfinite(layer.alpha):
        return f"has alpha {layer.alpha}, which is not finite{damaged}"
    if any(not tensor.is_meta and not torch.isfinite(tensor).all() for tensor in (down, up)):
        return "holds NaN or infinite numbers; use another copy, or train again with a lower learning rate or in fp32"
    if not down.is_meta:
        largest = abs(layer.alpha) * float(down.abs().max()) * float(up.abs().max())  # alpha = scale · rank
        if not largest < torch.finfo(torch.float32).max:
            return "is too large: its change does not fit into 32 bits; use another copy, or smaller weights"
    return None


def layer_tensors(name: str, layer: LoraLayer) -> list[tuple[str, Tensor]]:
    """Return the kohya keys and tensors of a layer."""
    return [
        (f"{name}.lora_down.weight", layer.down),
        (f"{name}.lora_up.weight", layer.up),
        (f"{name}.alpha", torch.tensor(layer.alpha, dtype=torch.float32)),
    ]
