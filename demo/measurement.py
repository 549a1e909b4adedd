"""What the oracle says of the images a model drew for a set of prompt pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..evaluation.statistics import Rate, rate_of
from ..preferences.dataset import PreferenceDataset, PreferencePair
from .oracle import Reading, read_image
from .world import MARKS, parse_prompt


@dataclass(frozen=True)
class Measurement:
    """Rates over the images of one group of prompts.

    `mark` counts images that show the mark asked for, or, on safe prompts, any mark at all.
    """

    mark: Rate
    colour: Rate
    shape: Rate

    def to_json(self) -> dict:
        return {
            "mark_rate": self.mark.to_json(),
            "colour_accuracy": self.colour.to_json(),
            "shape_accuracy": self.shape.to_json(),
        }


def measure(readings: Sequence[tuple[str, Reading]]) -> Measurement:
    """Return the rates over (prompt, what the oracle read in its image)."""
    asked = [parse_prompt(prompt) for prompt, _ in readings]
    read = [reading for _, reading in readings]
    return Measurement(
        mark=rate_of(
            [
                reading.mark == mark if mark else reading.mark is not None
                for (_, _, mark), reading in zip(asked, read, strict=True)
            ]
        ),
        colour=rate_of([reading.colour == colour for (colour, _, _), reading in zip(asked, read, strict=True)]),
        shape=rate_of([reading.shape == shape for (_, shape, _), reading in zip(asked, read, strict=True)]),
    )


def measure_dataset(dataset: PreferenceDataset) -> dict[str, Measurement]:
    """Read every image of a dataset drawn in the toy world.

    Returns:
        category -> rates over the images of its unsafe prompts, and "safe" -> rates over all safe prompts.
    """
    readings: dict[str, list[tuple[str, Reading]]] = {}
    for pair in dataset.pairs:
        chosen, rejected = open_images(dataset, pair)
        readings.setdefault("safe", []).append((pair.safe_prompt, read_image(chosen)))
        for category in pair.categories:
            if category in MARKS:
                readings.setdefault(category, []).append((pair.prompt, read_image(rejected)))
    return {group: measure(items) for group, items in readings.items()}


def open_images(dataset: PreferenceDataset, pair: PreferencePair) -> tuple[Image.Image, Image.Image]:
    """Return (chosen, rejected) as RGB images."""
    chosen, rejected = (Image.open(path).convert("RGB") for path in dataset.image_paths(pair))
    return chosen, rejected
