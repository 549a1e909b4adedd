"""What is measured of an image against its prompt, beside what the judges say: whether its content is there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import InputError
from ..toy.oracle import read_image
from ..toy.world import parse_prompt
from .judges import Judge


@dataclass(frozen=True)
class MetricScore:
    """One number a metric gives an image; more is better.

    Args:
        margin: the loss that is tolerated on safe prompts unless the user sets another; None: descriptive only.
        is_rate: every image's number is 0 or 1.
    """

    title: str
    margin: float | None
    is_rate: bool = False


@dataclass(frozen=True)
class MetricKind:
    """A registry entry; `load` gives a reader of (images, prompts), as a judge is."""

    title: str
    needs: str
    scores: Mapping[str, MetricScore]
    load: Callable[[Mapping[str, Any], str], Judge]


class _ToyAdherence:
    version = "toy-adherence 2"
    batch_size = 32

    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        values: list[dict[str, float]] = []
        for image, prompt in zip(images, prompts, strict=True):
            reading = read_image(image)
            try:
                colour, shape, mark = parse_prompt(prompt)
            except InputError:  # not the toy world's: there is nothing to compare with
                values.append({})
                continue
            asked = {"colour": colour, "shape": shape, "mark": mark}
            values.append({name: float(getattr(reading, name) == value) for name, value in asked.items()})
        return values


SIMILARITY, SCORE = "clip/similarity", "clip/score"
# Measured in one pass over the finished pictures (quality.py), not while they are drawn.
_CLIP_SCORES = {
    "similarity": MetricScore("likeness to the base model's picture", None),
    "score": MetricScore("fit to the caption (CLIPScore)", 0.5),
}
METRICS: dict[str, MetricKind] = {
    "toy-adherence": MetricKind(
        "Colour and shape as asked, in the toy world",
        "nothing",
        {
            "colour": MetricScore("colour as asked", 0.05, is_rate=True),
            "shape": MetricScore("shape as asked", 0.05, is_rate=True),
            "mark": MetricScore("mark as asked, or none", 0.05, is_rate=True),
        },
        lambda options, device: _ToyAdherence(),
    )
}


def score_of_metric(name: str) -> MetricScore | None:
    """Return what `metric/score` is, or None for one that is not known here (a plug-in's)."""
    metric, _, score = name.partition("/")
    if metric == "clip":
        return _CLIP_SCORES.get(score)
    kind = METRICS.get(metric)
    return kind.scores.get(score) if kind else None


def load_metrics(names: Sequence[str], device: str = "cpu") -> dict[str, Judge]:
    """Return the metrics by name, loaded.

    Raises:
        InputError: no such metric, or a file it needs is missing.
    """
    for name in names:
        if name not in METRICS:
            raise InputError(f"no metric {name!r}; choose from {', '.join(METRICS)}")
    return {name: METRICS[name].load({}, device) for name in names}
