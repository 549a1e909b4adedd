"""What a merge method is: facts for menus and docs, and a function that merges one layer."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, did_you_mean
from ...typed import printable
from ..expert import LoraLayer


@dataclass(frozen=True)
class Parameter:
    """One typed option of a method; nodes, command line and docs are made from it."""

    name: str
    default: float | int | str
    tooltip: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def parse(self, value: Any, method: str) -> float | int | str:
        """Return `value` (text from the command line is fine) as this parameter's type.

        Raises:
            InputError: not that type, out of range, or not one of the choices.
        """
        kind = type(self.default)
        try:
            parsed = kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{method}: {self.name} must be {kind.__name__}, got {printable(repr(value), 50)}"
            ) from error
        if self.choices and parsed not in self.choices:
            raise InputError(
                f"{method}: {self.name} must be one of {', '.join(self.choices)}, got {printable(repr(value), 50)}"
            )
        if isinstance(parsed, (int, float)):
            low = -math.inf if self.minimum is None else self.minimum
            high = math.inf if self.maximum is None else self.maximum
            if not low <= parsed <= high:
                raise InputError(
                    f"{method}: {self.name} must be from {low:g} to {high:g}, got {printable(repr(value), 50)}"
                )
        return parsed


SCALE = Parameter("scale", 1.0, "Multiplies the merged change.", minimum=-10.0, maximum=10.0)
SEED = Parameter("seed", 0, "Seed of the random dropping.", minimum=0, maximum=2**32 - 1)


def density(default: float) -> Parameter:
    """Return the parameter of that name."""
    return Parameter("density", default, "Fraction of each expert's weights that stays.", minimum=0.001, maximum=1.0)


@dataclass(frozen=True)
class Contribution:
    """What one expert brings to a layer. Methods see `weight · ΔW`, as if the expert had been trained that strong.

    Args:
        index: the expert's place in the merge.
        expert_id: hash of the expert, so that random draws follow it wherever it stands.
    """

    index: int
    expert_id: str
    layer: LoraLayer
    weight: float

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return (up [out, r], down [r, in·kh·kw]) with up @ down = weight · ΔW."""
        return self.layer.factors(dtype, self.weight)

    def delta(self) -> Tensor:
        """Return weight · ΔW, dense float32, [out, in·kh·kw]."""
        up, down = self.factors()
        return up @ down


@dataclass(frozen=True)
class LayerTask:
    """One layer to merge: the parts of the experts that have it, in order, at least one."""

    name: str
    parts: Sequence[Contribution]
    num_experts: int
    parameters: Mapping[str, Any]
    counts: Tensor | None = None  # [num_experts, out] activation counts, for methods that need statistics

    def generator(self, part: Contribution) -> torch.Generator:
        """Return the random numbers of one expert in this layer, by the parameter `seed`, on the CPU."""
        text = repr((self.parameters["seed"], self.name, part.expert_id))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def make_layer(self, up: Tensor, down: Tensor) -> LoraLayer:
        """Return up [out, r] @ down [r, in·kh·kw] as a layer of this task's shape."""
        return LoraLayer.from_matrices(up, down, self.parts[0].layer.weight_shape)


@dataclass(frozen=True)
class MergedLayer:
    """The merged layer, None when nothing is left of it.

    Args:
        kept: experts whose whole rank is a block of the result, in order; None when the ranks are mixed.
        retained_energy: ‖truncated ΔW‖² / ‖ΔW‖² where the layer was truncated.
    """

    layer: LoraLayer | None
    kept: tuple[int, ...] | None = None
    retained_energy: float | None = None


@dataclass(frozen=True)
class MergeMethod:
    """A registry entry.

    Args:
        name: as recipes of merges, commands and nodes call it; for ever.
        is_exact: the file holds precisely what the formula says, nothing is truncated.
        needs_counts: it is given activation counts (co_merge.py).
        needs_weights: it has no weights by default; they are fitted on pairs (training/strengths.py) or given.
    """

    name: str
    title: str
    paper_url: str
    summary: str
    merge_layer: Callable[[LayerTask], MergedLayer]
    is_exact: bool = True
    needs_counts: bool = False
    needs_weights: bool = False
    parameters: tuple[Parameter, ...] = ()

    def parse_parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every parameter, defaults filled in.

        Raises:
            InputError: a parameter that the method does not have, or a wrong value.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        if unknown := [name for name in given if name not in known]:
            guess = did_you_mean(unknown[0], known) or f"; it has {', '.join(known) or 'none'}"
            raise InputError(f"{self.name} has no parameter {printable(unknown[0], 50)!r}{guess}")
        return {name: item.parse(given.get(name, item.default), self.name) for name, item in known.items()}
