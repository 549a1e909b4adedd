"""What a file contains: for `inspect`, for the nodes and for people."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import sha256_of_file
from ..tensor_file import read_tensors
from .blocks import RankBlock, rank_blocks
from .expert import Expert
from .info import ExpertInfo
from .keys import comfyui_matches


@dataclass(frozen=True)
class FileDescription:
    """An expert file or any LoRA.

    Args:
        ranks, alphas: different ones, rising.
        num_values: numbers in all layers together.
        blocks: only those that have a strength of their own.
        num_keys: in the file.
        ignored_keys: those that stock ComfyUI's loader does not know.
    """

    name: str
    info: ExpertInfo
    sha256: str
    num_layers: int
    ranks: list[int]
    alphas: list[float]
    num_values: int
    blocks: list[RankBlock]
    num_keys: int
    ignored_keys: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, with the metadata as they are in the file."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_layers": self.num_layers,
            "ranks": self.ranks,
            "alphas": self.alphas,
            "num_values": self.num_values,
            **self.info.model_dump(mode="json", exclude_none=True, exclude={"rank_blocks"}),
            "rank_blocks": [
                {"name": block.name, "categories": list(block.categories), "num_layers": len(block.ranks)}
                for block in self.blocks
            ],
            "comfyui": {
                "matched_keys": self.num_keys - len(self.ignored_keys),
                "ignored_keys": len(self.ignored_keys),
                "first_ignored": self.ignored_keys[:3],
            },
        }


def describe_file(path: str | os.PathLike) -> FileDescription:
    """Return what a file contains and which of its keys stock ComfyUI's loader knows.

    Raises:
        InputError: the file cannot be read as a LoRA.
    """
    tensors, metadata = read_tensors(path)
    expert = Expert.from_state_dict(tensors, metadata, str(path))
    layers = expert.layers.values()
    return FileDescription(
        name=Path(path).stem,
        info=expert.info,
        sha256=sha256_of_file(path),
        num_layers=len(layers),
        ranks=sorted({layer.rank for layer in layers}),
        alphas=sorted({layer.alpha for layer in layers}),
        num_values=sum(layer.down.numel() + layer.up.numel() for layer in layers),
        blocks=rank_blocks(expert) if expert.info.rank_blocks else [],
        num_keys=len(tensors),
        ignored_keys=[key for key in tensors if not comfyui_matches(key)],
    )
