"""Keeps a style LoRA out of the way of safety experts: what works in the experts' directions is removed from it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError
from .expert import Expert, LoraLayer
from .info import Protected
from .overlap import energy, shared_layers, spaces

Space = Literal["output", "input", "both"]
SPACES: tuple[Space, ...] = get_args(Space)


def protect(
    style: Expert,
    experts: Sequence[Expert],
    *,
    space: Space = "output",
    strength: float = 1.0,
    name: str | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> Expert:
    """Remove from a style LoRA what works in the experts' directions, exactly and at its own rank.

    With V an orthonormal basis of all experts' row spaces together and U one of their column spaces, in each layer

        output  up'   = (I - strength U Uᵀ) up:   the style no longer writes where the experts write
        input   down' = down (I - strength V Vᵀ): the style no longer reads what the experts read
        both    both of these

    At strength 1 either makes ⟨ΔW_style, ΔW_expert⟩ zero, but they promise different things of what a layer puts out:
    after `output`, Uᵀ y is for every input what it is without the style; after `input`, y is so for inputs within V,
    and real inputs have more than that, from which a style can still write the opposite of the expert
    (benchmarks/modular_lora.py). Layers that no expert has, alphas and ranks stay; changed factors become float32.

    Args:
        style: any LoRA.
        experts: at least one; as they are applied (a merge protects all of its parents).
        space: see above.
        strength: 0 leaves the style as it is, 1 removes all of that part.
        name: of the result; default is the style's with `_protected`.
        on_layer: called with (layers done, layers in all).

    Returns:
        The style, with all that it takes to reproduce it in its info.

    Raises:
        InputError: no expert, a strength outside 0 … 1, or an expert and a style of different models.

    Source: ours; orthogonal subspaces against interference are known from O-LoRA (arXiv 2310.14152).
    """
    if not experts:
        raise InputError("nothing to protect: give at least one expert")
    if space not in SPACES:
        raise InputError(f"space {space!r} must be one of {', '.join(SPACES)}")
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"strength {strength:g} must be from 0 to 1")
    shared = {layer for expert in experts for layer in shared_layers(expert, style)}
    layers = {}
    for done, (layer_name, layer) in enumerate(style.layers.items(), start=1):
        layers[layer_name] = layer
        if layer_name in shared and strength:
            layers[layer_name] = _protect_layer(
                layer, [expert.layers[layer_name] for expert in experts if layer_name in expert.layers], space, strength
            )
        if on_layer:
            on_layer(done, len(style.layers))
    parents = tuple(expert.as_parent() for expert in (style, *experts))
    origin = Protected(space=space, strength=strength, parents=parents, before=style.info.origin)
    # The strengths describe how the style was made, which its own file still says.
    info = style.info.model_copy(update={"origin": origin, "category_strengths": {}})
    return replace(style, layers=layers, info=info, name=name or f"{style.name}_protected", file_sha256=None)


def kept_energy(style: Expert, protected: Expert) -> float:
    """Return ‖ΔW'‖² / ‖ΔW‖² over all layers: how much of the style is left, 0 to 1."""
    before, after = (
        sum(energy(*layer.factors(torch.float64)) for layer in lora.layers.values()) for lora in (style, protected)
    )
    return after / before if before else 1.0


def _protect_layer(layer: LoraLayer, expert_layers: Sequence[LoraLayer], space: Space, strength: float) -> LoraLayer:
    bases = [spaces(expert_layer) for expert_layer in expert_layers]
    down, up = layer.down, layer.up
    if space != "output":
        rows = _union([rows for _, rows in bases])
        matrix = down.double().flatten(1)
        down = (matrix - strength * (matrix @ rows) @ rows.T).float().reshape(down.shape)
    if space != "input":
        columns = _union([columns for columns, _ in bases])
        matrix = up.double().flatten(1)
        up = (matrix - strength * columns @ (columns.T @ matrix)).float().reshape(up.shape)
    return LoraLayer(down, up, layer.alpha)


def _union(bases: Sequence[Tensor]) -> Tensor:
    """Return an orthonormal basis [n, k] of the sum of the spaces that orthonormal bases [n, k_i] span."""
    u, s, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return u[:, s > torch.finfo(torch.float32).eps]
