"""Rank blocks: which slice of each layer's rank belongs to which categories, so a merge keeps one strength a category.

They are in the metadata in rank order (`info.RankBlockEntry`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import InputError
from .expert import Expert, LoraLayer
from .info import RankBlockEntry


@dataclass(frozen=True)
class RankBlock:
    """One contributor of an expert: its name, its categories and its share of each layer's rank."""

    name: str
    categories: tuple[str, ...]
    ranks: dict[str, int] = field(repr=False)  # layer -> rank; layers without a share are left out

    def entry(self, layers: Sequence[str]) -> RankBlockEntry:
        """Return the metadata entry for an expert with these layers."""
        sizes = [self.ranks.get(layer, 0) for layer in layers]
        usual = max(sorted(set(sizes)), key=sizes.count, default=0)
        others = {layer: size for layer, size in zip(layers, sizes, strict=True) if size != usual}
        return RankBlockEntry(name=self.name, categories=self.categories, rank=usual, layers=others)


def rank_blocks(expert: Expert) -> list[RankBlock]:
    """Return the expert's blocks in rank order; an expert without any is one block.

    Raises:
        InputError: the blocks do not add up to the ranks of the layers.
    """
    entries = expert.info.rank_blocks
    if entries is None:
        ranks = {name: layer.rank for name, layer in expert.layers.items()}
        return [RankBlock(expert.name, tuple(expert.categories), ranks)]
    blocks = []
    for entry in entries:
        sizes = {name: entry.layers.get(name, entry.rank) for name in expert.layers}
        ranks = {name: size for name, size in sizes.items() if size}
        blocks.append(RankBlock(entry.name, entry.categories, ranks))
    for name, layer in expert.layers.items():
        total = sum(block.ranks.get(name, 0) for block in blocks)
        if total != layer.rank:
            raise InputError(
                f"{expert.name}: its rank blocks add up to {total} in layer {name}, whose rank is {layer.rank}; "
                "another tool changed the file, merge the experts again"
            )
    return blocks


def known_categories(expert: Expert) -> list[str]:
    """Return the categories that have a strength of their own or share one, in block order."""
    return list(dict.fromkeys(category for block in rank_blocks(expert) for category in block.categories))


def scale_categories(expert: Expert, strengths: Mapping[str, float], default: float = 1.0) -> Expert:
    """Scale each block of an expert by the strength of its categories.

    A block of several categories gets the mean of their strengths. Where every strength is 1 the same tensors are
    returned.

    Args:
        strengths: category -> multiplier.
        default: strength of categories that are not named, and of blocks without categories.

    Raises:
        InputError: a category that the expert does not have.
    """
    blocks = rank_blocks(expert)
    known = known_categories(expert)
    if unknown := [category for category in strengths if category not in known]:
        remedy = ", ".join(known) or "none, so only the overall strength can be set"
        raise InputError(f"{expert.name} has no category {unknown[0]!r}; it has {remedy}")

    def strength_of(block: RankBlock) -> float:
        own = [strengths.get(category, default) for category in block.categories] or [default]
        return sum(own) / len(own)

    block_strengths = [strength_of(block) for block in blocks]
    if all(strength == 1.0 for strength in block_strengths):
        return expert
    layers = {}
    for name, layer in expert.layers.items():
        columns = torch.cat(
            [
                torch.full((block.ranks.get(name, 0),), strength, device=layer.up.device)
                for block, strength in zip(blocks, block_strengths, strict=True)
            ]
        )
        up = layer.up.float() * columns.reshape(1, -1, *[1] * (layer.up.ndim - 2))
        layers[name] = LoraLayer(layer.down, up.to(layer.up.dtype), layer.alpha)
    earlier = expert.info.category_strengths
    applied = {name: earlier.get(name, 1.0) * strengths.get(name, default) for name in known}
    info = expert.info.model_copy(update={"category_strengths": applied})
    return replace(expert, layers=layers, info=info, file_sha256=None)
