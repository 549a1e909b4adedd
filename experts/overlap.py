"""How much of a style LoRA works where a safety expert works, layer by layer, from the factors alone.

With ΔW_e = U S Vᵀ the expert's change and ΔW_s the style's, the style

- reads the share ‖ΔW_s V‖² / ‖ΔW_s‖² of what it does from the expert's input directions (its row space),
- writes the share ‖Uᵀ ΔW_s‖² / ‖ΔW_s‖² of it into the expert's output directions (its column space), and
- lies ⟨ΔW_s, ΔW_e⟩ / ‖ΔW_e‖² along the expert: at -1 it undoes it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .compatibility import check_one_model
from .expert import Expert, LoraLayer
from .truncation import truncate_factors


@dataclass(frozen=True)
class Overlap:
    """Squared Frobenius norms and an inner product; they add up, so a sum of layers is an overlap again.

    The `chance` norms are those expected of a style that knows nothing of the expert: k of n directions hold k / n.
    """

    style_energy: float = 0.0  # ‖ΔW_s‖²
    expert_energy: float = 0.0  # ‖ΔW_e‖²
    inner: float = 0.0  # ⟨ΔW_s, ΔW_e⟩
    read_energy: float = 0.0  # ‖ΔW_s V‖²
    written_energy: float = 0.0  # ‖Uᵀ ΔW_s‖²
    read_chance_energy: float = 0.0
    written_chance_energy: float = 0.0

    @property
    def read_share(self) -> float:
        """Share of the style that reads the expert's input directions, 0 to 1."""
        return _ratio(self.read_energy, self.style_energy)

    @property
    def written_share(self) -> float:
        """Share of the style that writes into the expert's output directions, 0 to 1."""
        return _ratio(self.written_energy, self.style_energy)

    @property
    def along_expert(self) -> float:
        """The style's part along the expert, in units of the expert: -1 undoes it, 1 doubles it."""
        return _ratio(self.inner, self.expert_energy)

    @property
    def read_chance(self) -> float:
        return _ratio(self.read_chance_energy, self.style_energy)

    @property
    def written_chance(self) -> float:
        return _ratio(self.written_chance_energy, self.style_energy)

    def to_json(self) -> dict[str, float]:
        names = ("read_share", "read_chance", "written_share", "written_chance", "along_expert")
        return {name: round(getattr(self, name), 6) for name in names}


def overlap(expert: Expert, style: Expert) -> dict[str, Overlap]:
    """Return the overlap of every layer that both have, in the style's order.

    Ranks, alphas and precisions may differ; a convolution counts as its matrix [out, in·kh·kw]. Nothing of ΔW's size is
    formed: it takes O((in + out) · r²) a layer.

    Raises:
        InputError: they share no layer, or one has two shapes: they are made for different models.
    """
    overlaps = {}
    for name in shared_layers(expert, style):
        style_up, style_down = style.layers[name].factors(torch.float64)
        expert_up, expert_down = expert.layers[name].factors(torch.float64)
        columns, rows = spaces(expert.layers[name])
        style_energy = energy(style_up, style_down)
        overlaps[name] = Overlap(
            style_energy=style_energy,
            expert_energy=energy(expert_up, expert_down),
            inner=float(((style_up.T @ expert_up) * (style_down @ expert_down.T)).sum()),
            read_energy=energy(style_up, style_down @ rows),
            written_energy=energy(columns.T @ style_up, style_down),
            read_chance_energy=style_energy * rows.shape[1] / rows.shape[0],
            written_chance_energy=style_energy * columns.shape[1] / columns.shape[0],
        )
    return overlaps


def total(overlaps: Iterable[Overlap]) -> Overlap:
    """Return the overlap of all layers together."""
    return Overlap(*(sum(values) for values in zip(*map(astuple, overlaps), strict=True)))


def shared_layers(expert: Expert, style: Expert) -> list[str]:
    """Return the layers that both have, in the style's order.

    Raises:
        InputError: there is none, or one has two shapes.
    """
    shared = [name for name in style.layers if name in expert.layers]
    if not shared:
        raise InputError(f"{style.name} and {expert.name} have no layer in common; give LoRAs of one model family")
    check_one_model([style, expert])
    return shared


def energy(up: Tensor, down: Tensor) -> float:
    """Return ‖up @ down‖² (squared Frobenius norm) without forming it."""
    return float(((up.T @ up) * (down @ down.T)).sum())


def spaces(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of ΔW's column space [out, k] and row space [in·kh·kw, k], float64; k: its true rank."""
    up, down = layer.factors(torch.float64)
    kept = truncate_factors(up, down, layer.rank)
    if kept is None:
        return up[:, :0], down.T[:, :0]
    return torch.nn.functional.normalize(kept.up, dim=0), torch.nn.functional.normalize(kept.down.T, dim=0)


def overlap_table(expert: Expert, style: Expert, overlaps: dict[str, Overlap], layers: Sequence[str] = ()) -> str:
    """Return the overlap as a plain-text table: a line for each of `layers`, then one for all of them together."""
    lines = [
        f"{style.name} on {expert.name}: {len(overlaps)} of the style's {len(style.layers)} layers are in the expert",
        "   reads  (chance)  writes  (chance)  along expert  layer",
    ]
    for name, item in [*((name, overlaps[name]) for name in layers), ("all together", total(overlaps.values()))]:
        lines.append(
            f"{item.read_share:8.2%}{item.read_chance:10.2%}{item.written_share:8.2%}{item.written_chance:10.2%}"
            f"{item.along_expert:14.4f}  {name}"
        )
    return "\n".join(lines)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
