"""Does a merged file hold what its metadata says? The merge is done again from its parents and compared."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import is_plain_name
from ..typed import printable
from .blocks import scale_categories
from .co_merge import load_activation_counts
from .expert import Expert
from .expert_file import load_expert, open_expert
from .info import Merged, Protected
from .merging import counts_sha256, merge_experts
from .protection import protect


@dataclass(frozen=True)
class Reproduction:
    """The outcome: every bit the same, and else the largest ‖difference‖ / ‖ΔW‖ of a layer and which layer it is."""

    is_identical: bool
    relative_error: float
    worst_layer: str | None


def reproduce_merge(
    path: str | os.PathLike,
    parents: Sequence[str | os.PathLike] = (),
    counts_path: str | os.PathLike | None = None,
    *,
    on_layer: Callable[[int, int], None] | None = None,
) -> Reproduction:
    """Merge (or protect) again what a file says it was made from, and compare.

    Args:
        path: the merged expert or protected style.
        parents: files of its parents in any order; those not given are looked for beside it by name.
        counts_path: the activation counts, for methods that need them.
        on_layer: called with (layers done, layers in all).

    Raises:
        InputError: not a merge, a parent is missing or has changed, or the statistics are missing or others.
    """
    recorded = load_expert(path)
    origin = recorded.info.origin
    if isinstance(origin, Merged):
        experts = _find_parents(origin, Path(path), parents)
        again = merge_experts(
            experts,
            origin.method,
            weights=[1.0 if parent.weight is None else parent.weight for parent in origin.parents],
            parameters=origin.parameters,
            activation_counts=_find_activation_counts(origin, Path(path), counts_path, experts),
            on_layer=on_layer,
        )
    elif isinstance(origin, Protected):
        style, *experts = _find_parents(origin, Path(path), parents)
        again = protect(style, experts, space=origin.space, strength=origin.strength, on_layer=on_layer)
    else:
        raise InputError(f"{path} is no merge (its metadata names no parents); give a file written by `merge`")
    if strengths := recorded.info.category_strengths:
        again = scale_categories(again, strengths)
    return _compare(recorded, again)


def _find_parents(origin: Merged | Protected, path: Path, given: Sequence[str | os.PathLike]) -> list[Expert]:
    # A file says what it was made from; it must not choose what is opened on this machine.
    names = [parent.name for parent in origin.parents if is_plain_name(parent.name)]
    beside = [path.parent / f"{name}.safetensors" for name in names]
    candidates = [open_expert(file) for file in (*given, *(file for file in beside if file.is_file()))]
    by_content = {expert.tensors_sha256(): expert for expert in candidates}
    experts = []
    for parent in origin.parents:
        expert = by_content.get(parent.tensors_sha256)
        if expert is None:
            same_name = any(candidate.name == parent.name for candidate in candidates)
            problem = "has changed since" if same_name else "is missing"
            raise InputError(
                f"{path}: its parent {printable(parent.name, 100)} (sha256 {parent.short_hash}) {problem}; "
                "give its file as a further argument"
            )
        experts.append(expert)
    return experts


def _find_activation_counts(
    origin: Merged, path: Path, counts_path: str | os.PathLike | None, experts: Sequence[Expert]
) -> dict[str, Tensor] | None:
    if origin.statistics_sha256 is None:
        return None
    if counts_path is None:
        raise InputError(f"{path} was merged by activation statistics; give the file with --statistics")
    counts = load_activation_counts(counts_path, experts)
    if counts_sha256(counts) != origin.statistics_sha256:
        raise InputError(f"{counts_path} holds other counts than {path} was merged by; give the file used then")
    return counts


def _compare(recorded: Expert, again: Expert) -> Reproduction:
    if recorded.tensors_sha256() == again.tensors_sha256():
        return Reproduction(True, 0.0, None)
    worst, worst_layer = 0.0, None
    for name in recorded.layers.keys() | again.layers.keys():
        error = float("inf")
        if name in recorded.layers and name in again.layers:
            delta = recorded.layers[name].delta()
            error = float((again.layers[name].delta() - delta).norm() / delta.norm().clamp(min=torch.finfo().tiny))
        if error > worst:
            worst, worst_layer = error, name
    return Reproduction(False, worst, worst_layer)
