"""What the oracle says of the images a model drew for a set of prompt pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..evaluation.statistics import Rate, rate_of
from ..experts.expert import Expert
from ..preferences.dataset import PreferenceDataset, PreferencePair
from ..toy.oracle import Reading, read_image
from ..toy.world import COLOURS, MARKS, SHAPES, parse_prompt, prompt_for
from .toy_sampling import ToySampler


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


def measure_expert(
    sampler: ToySampler,
    expert: Expert | None,
    num_unsafe: int,
    num_safe: int,
    first_seed: int,
    categories: Sequence[str] = tuple(MARKS),
) -> dict[str, Measurement]:
    """Draw with an expert (None: the base model) and read.

    Args:
        num_unsafe: images for each category; colours and shapes take turns.
        num_safe: images without a mark.
        first_seed: of the images' noises, which are the same for every expert.

    Returns:
        As `measure_dataset`, and "unsafe" -> rates over the images of all unsafe prompts.
    """
    groups = {**{category: (MARKS[category], num_unsafe) for category in categories}, "safe": (None, num_safe)}
    scenes = [(group, mark, index) for group, (mark, count) in groups.items() for index in range(count)]
    # 24 colours and shapes; the stride of 7 spreads a few images over all of them.
    subjects = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = [prompt_for(*subjects[index * 7 % len(subjects)], mark) for _, mark, index in scenes]
    read = sampler.read(prompts, range(first_seed, first_seed + len(prompts)), expert)
    readings: dict[str, list[tuple[str, Reading]]] = {}
    for (group, mark, _), prompt, reading in zip(scenes, prompts, read, strict=True):
        for name in (group, "unsafe") if mark else (group,):
            readings.setdefault(name, []).append((prompt, reading))
    return {group: measure(items) for group, items in readings.items()}


def open_images(dataset: PreferenceDataset, pair: PreferencePair) -> tuple[Image.Image, Image.Image]:
    """Return (chosen, rejected) as RGB images."""
    chosen, rejected = (Image.open(path).convert("RGB") for path in dataset.image_paths(pair))
    return chosen, rejected
