"""Merging experts into one, layer by layer, with where everything came from in the result's metadata."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_id import CheckpointId
from ..errors import InputError, did_you_mean
from ..tensor_file import tensor_bytes
from ..typed import printable
from .blocks import RankBlock, rank_blocks
from .compatibility import check_one_model
from .expert import Expert, LoraLayer
from .fused import in_one_spelling
from .info import ExpertInfo, Merged
from .merge_methods import METHODS, Contribution, LayerTask, MergeMethod

logger = logging.getLogger(__name__)

__all__ = ["METHODS", "find_method", "merge_experts"]


def merge_experts(
    experts: Sequence[Expert],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    activation_counts: Mapping[str, Tensor] | None = None,
    name: str = "merged",
    device: torch.device | str | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Expert:
    """Merge experts, by weight, however their files spell it; a layer that some expert lacks gets nothing from it.

    Args:
        experts: at least one; alphas and ranks may differ.
        method: a key of METHODS.
        weights: one a expert, default 1; each ΔW is multiplied by it.
        parameters: the method's own; missing ones take their defaults.
        activation_counts: layer -> counts [K, out] from ActivationCounter, for methods that need them, in `experts`'
            order.
        name: of the result.
        device: where to compute; default is where each expert's tensors are. The result is on the CPU.
        on_layer: called with (layers done, layers in all).

    Returns:
        Expert, float32, with parents, method, parameters and (where ranks stay apart) rank blocks in its info.

    Raises:
        InputError: unknown method or parameter, shapes that differ, or statistics that are missing or do not fit.
    """
    entry = find_method(method)
    experts = list(experts)
    if not experts:
        raise InputError("nothing to merge: give at least one expert")
    if entry.needs_weights and weights is None and len(experts) > 1:
        raise InputError(f"{method} needs weights: fit them on a dataset of pairs (--calibration), or give them")
    chosen_weights = [1.0] * len(experts) if weights is None else [float(weight) for weight in weights]
    if len(chosen_weights) != len(experts):
        raise InputError(f"{len(chosen_weights)} weights for {len(experts)} experts; give one weight an expert")
    if not all(map(math.isfinite, chosen_weights)):
        raise InputError(f"weights {chosen_weights} must be finite numbers")
    values = entry.parse_parameters(parameters or {})
    if entry.needs_counts and activation_counts is None and len(experts) > 1:
        raise InputError(f"{method} needs activation statistics; calibrate on prompts or give a statistics file")

    parents = experts
    expert_ids = [expert.tensors_sha256() for expert in parents]
    experts = in_one_spelling(parents)
    check_one_model(experts)
    names = list(dict.fromkeys(layer for expert in experts for layer in expert.layers))
    layers: dict[str, LoraLayer] = {}
    kept_by_layer: dict[str, tuple[int, ...]] | None = {}
    retained_energy: dict[str, float] = {}
    for done, layer_name in enumerate(names, start=1):
        parts = _parts(experts, expert_ids, chosen_weights, layer_name, device)
        counts = None
        if entry.needs_counts and len(experts) > 1:
            counts = _layer_counts(activation_counts or {}, layer_name, len(experts), parts)
        merged = entry.merge_layer(LayerTask(layer_name, parts, len(experts), values, counts))
        if merged.layer is not None:
            layers[layer_name] = LoraLayer(merged.layer.down.cpu(), merged.layer.up.cpu(), merged.layer.alpha)
        if merged.kept is None:
            kept_by_layer = None
        elif kept_by_layer is not None:
            kept_by_layer[layer_name] = merged.kept
        if merged.retained_energy is not None:
            retained_energy[layer_name] = round(merged.retained_energy, 6)
        if on_layer:
            on_layer(done, len(names))

    if not layers:
        raise InputError(
            f"{method}: nothing is left of {', '.join(expert.name for expert in experts)}; they have no layers, or no "
            "layer was active on the calibration prompts"
        )
    counts_hash = counts_sha256(activation_counts) if activation_counts is not None and entry.needs_counts else None
    origin = Merged(
        method=method,
        parameters=values,
        parents=tuple(map(Expert.as_parent, parents, chosen_weights, expert_ids)),
        statistics_sha256=counts_hash,
        retained_energy=retained_energy,
    )
    blocks = None
    if kept_by_layer is not None:
        blocks = tuple(block.entry(list(layers)) for block in _merged_blocks(experts, kept_by_layer))
    info = ExpertInfo(
        categories=tuple(dict.fromkeys(category for expert in experts for category in expert.categories)),
        base_checkpoint=_common_base(experts),
        origin=origin,
        rank_blocks=blocks,
    )
    return Expert(layers, info, name)


def counts_sha256(activation_counts: Mapping[str, Tensor]) -> str:
    """Return a hash of activation counts: layer names, shapes and values."""
    digest = hashlib.sha256()
    for layer, counts in sorted(activation_counts.items()):
        digest.update(f"{layer} {list(counts.shape)}\n".encode())
        digest.update(tensor_bytes(counts.to(torch.int64)))
    return digest.hexdigest()


def find_method(method: str) -> MergeMethod:
    """Return the registry entry of a method.

    Raises:
        InputError: there is no such method.
    """
    if method not in METHODS:
        guess = did_you_mean(method, METHODS) or f"; choose one of {', '.join(METHODS)}"
        raise InputError(f"no merge method {printable(method, 50)!r}{guess}")
    return METHODS[method]


def _parts(
    experts: Sequence[Expert], expert_ids: Sequence[str], weights: Sequence[float], name: str, device
) -> list[Contribution]:
    parts: list[Contribution] = []
    for index, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
        layer = expert.layers.get(name)
        if layer is None:
            continue
        if device is not None and torch.device(device).type != "mps":  # which has no float64
            layer = LoraLayer(layer.down.to(device), layer.up.to(device), layer.alpha)
        parts.append(Contribution(index, expert_ids[index], layer, weight))
    return parts


def _layer_counts(
    activation_counts: Mapping[str, Tensor], name: str, num_experts: int, parts: Sequence[Contribution]
) -> Tensor:
    up = parts[0].layer.up
    expected = [num_experts, up.shape[0]]
    if name not in activation_counts:
        raise InputError(f"the statistics have no layer {name}; calibrate again with these experts")
    counts = activation_counts[name]
    if list(counts.shape) != expected:
        raise InputError(
            f"the statistics of layer {name} are {list(counts.shape)}, expected {expected} (experts, rows); "
            "calibrate again with these experts"
        )
    return counts.to(up.device)


def _common_base(experts: Sequence[Expert]) -> CheckpointId:
    """Return the model that all experts were trained on, an unknown one where they differ or not all say it."""
    bases = [expert.info.base_checkpoint for expert in experts]
    known = [base for base in bases if base != CheckpointId()]
    if any(not base.is_same_model(known[0]) for base in known):
        logger.warning("the experts were trained on different models: %s", ", ".join(base.name for base in known))
    elif len(known) == len(bases):
        return known[0]
    return CheckpointId()


def _merged_blocks(experts: Sequence[Expert], kept_by_layer: Mapping[str, tuple[int, ...]]) -> list[RankBlock]:
    """Blocks of the parents, in order, with their share in the layers that kept the parent."""
    blocks = []
    for index, expert in enumerate(experts):
        for block in rank_blocks(expert):
            ranks = {name: rank for name, rank in block.ranks.items() if index in kept_by_layer[name]}
            blocks.append(RankBlock(block.name, block.categories, ranks))
    return blocks
