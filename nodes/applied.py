"""Which experts are on a MODEL: Apply Safety Expert leaves a note, and a guard reads it when it samples."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ..experts.blocks import known_categories
from ..experts.expert import Expert

_KEY = "safety_experts_applied_"
_numbers = itertools.count()


@dataclass(frozen=True, repr=False)
class AppliedExpert:
    """An expert on a model.

    Attributes:
        expert: with its strengths.
        keys: layer name -> ComfyUI's weight key, or for a slice of a fused weight (key, (dimension, start, length)).
        is_in_weights: patched into the weights; otherwise it runs beside them, behind a gate.
    """

    expert: Expert
    keys: Mapping[str, object]
    is_in_weights: bool

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
