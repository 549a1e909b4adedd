"""Which experts are on a MODEL: Apply Safety Expert leaves a note, and a guard reads it when it samples."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..experts.blocks import known_categories
from ..experts.expert import Expert
from .model_identity import changes_of

_KEY = "safety_experts_applied_"
_numbers = itertools.count()


@dataclass(frozen=True, repr=False)
class AppliedExpert:
    """An expert on a model.

    Attributes:
        expert: with its strengths.
        keys: layer name -> ComfyUI's weight key, or for a slice of a fused weight (key, (dimension, start, length)).
        is_in_weights: patched into the weights; otherwise it runs beside them, behind a gate.
        file_sha256: of the file that the expert was read from, if there was one.
        strength: of all its categories; None where they differ.
    """

    expert: Expert
    keys: Mapping[str, object]
    is_in_weights: bool
    file_sha256: str | None = None
    strength: float | None = None

    @property
    def covered(self) -> set[str]:
        """The categories that it turns the model away from."""
        strengths = self.expert.info.category_strengths
        return {name for name in known_categories(self.expert) if strengths.get(name, 1.0) > 0}


def note_applied(model, applied: AppliedExpert) -> None:
    """Leave a note on a ModelPatcher; its clones keep it."""
    model.set_attachments(f"{_KEY}{next(_numbers)}", applied)


def applied_experts(model) -> list[AppliedExpert]:
    """Return the notes on a ModelPatcher, the first expert first."""
    return [value for key, value in model.attachments.items() if key.startswith(_KEY)]


def made_of(model, base_model) -> tuple[dict[str, Any], ...]:
    """Return what a ModelPatcher is, for an evaluation's plan: its changes, and its experts with categories.

    An expert's file and strength are named only where the expert, in one strength, is all that is on the weights and
    the base model is bare: only then are the numbers those of this very file, and its card shows them.
    """
    changes, experts = changes_of(model), applied_experts(model)
    parts: list[dict[str, Any]] = [
        {"name": applied.expert.name, "categories": ", ".join(applied.expert.categories)} for applied in experts
    ]
    if len(experts) == 1 and _is_alone(experts[0], model, changes) and not base_model.patches:
        parts[0] |= {"sha256": experts[0].file_sha256, "strength": experts[0].strength}
    return (changes | (parts[0] if parts else {}), *parts[1:])


def _is_alone(applied: AppliedExpert, model, changes: dict[str, Any]) -> bool:
    num_patches = sum(map(len, model.patches.values()))
    is_known = applied.file_sha256 is not None and applied.strength is not None
    return is_known and applied.is_in_weights and "functions" not in changes and num_patches <= len(applied.keys)
