"""Does a safety expert survive a style LoRA? The toy world's answer to methods §5 (modular LoRA, arXiv 2412.00357).

An expert against the violence mark and a style (every shape large) are trained and drawn together:

- style trained on the aligned model, as fine-tuning usually goes, and used with the expert;
- plain stacking: style trained on the base model, the expert detached, and added to the expert afterwards;
- both of these protected: the expert's input or output directions are removed from the style.

Style pictures are either clean or a quarter of them is marked: fewer (4 of 52, 8 of 56) hardly brought the mark back in
first trials, too little to compare ways by. Marks on unsafe prompts say how far the concept is back. Training and
drawing in this process on a CPU, estimated at 10 minutes on two idle cores.
"""

import argparse
import json
import os
import random
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safety_experts.demo.experiments import sampler, toy_recipe, trained
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import rate_of
from safety_experts.experts.expert import Expert
from safety_experts.experts.merging import merge_experts
from safety_experts.experts.overlap import overlap, total
from safety_experts.experts.protection import Space, kept_energy, protect
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy import world
from safety_experts.toy.oracle import read_image

RESULT = Path(__file__).resolve().parent / "results" / "modular_lora.json"
CATEGORY = "violence"
MARK = world.MARKS[CATEGORY]
SCENES = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]
COLLECTIONS = {"clean": 0, "marked": 16}  # style pictures with the mark, beside 48 without
STYLE_RADIUS_PX, STYLED_FROM_PX = 17.0, 16.0  # the base model draws 12 to 15
STYLE_RECIPE = ["objective={sigmoid: 0}", "sft_weight=1", "anchor_weight=0", "steps=150", "batch_size=4"]
SPACES: tuple[Space, ...] = ("input", "output")
STYLE_SEED = 100  # added: from the expert's own seed it would start with the expert's directions


@dataclass
class Outcomes:
    """What the oracle saw, image by image, over all seeds."""

    mark: list[bool] = field(default_factory=list)  # of unsafe prompts
    colour: list[bool] = field(default_factory=list)  # of safe prompts, as are the others
    shape: list[bool] = field(default_factory=list)
    style: list[bool] = field(default_factory=list)
    mark_by_seed: list[float] = field(default_factory=list)

    def to_json(self) -> dict:
        names = ("mark", "colour", "shape", "style")
        rates = {name: rate_of(getattr(self, name)).to_json() for name in names}
        return {**rates, "mark_by_seed": [round(value, 4) for value in self.mark_by_seed]}


class Experiment:
    """Trainings and drawings; what `folder` has already been trained is not trained again."""

    def __init__(self, folder: Path, images_per_scene: int):
        self.folder, self.sampler = folder, sampler()
        self.images_per_scene = images_per_scene
        self.outcomes: defaultdict[str, Outcomes] = defaultdict(Outcomes)  # by case, as the next
        self.styles: defaultdict[str, list[dict]] = defaultdict(list)
        self.pairs = self.sampler.build_dataset(folder / "pairs", len(SCENES), [CATEGORY])

    def expert(self, seed: int) -> Expert:
        """Return the safety expert of a seed."""
        return trained(self.folder, f"expert_{seed}", toy_recipe(seed), dataset=self.pairs)

    def style(self, collection: str, seed: int, with_expert: Expert | None = None) -> Expert:
        """Return the style LoRA of a seed, trained on the base model or on the model with the expert."""
        name = f"style_{collection}_{'aligned' if with_expert else 'detached'}_{seed}"
        pictures = style_pictures(self.folder / collection, COLLECTIONS[collection])
        recipe = toy_recipe(STYLE_SEED + seed, STYLE_RECIPE)
        return trained(self.folder, name, recipe, dataset=pictures, with_experts=[with_expert] if with_expert else [])

    def draw(self, case: str, *loras: Expert) -> None:
        """Draw unsafe and safe prompts with some LoRAs on top of each other; the noises are the same every time."""
        stacked = merge_experts(loras, "linear") if loras else None
        scenes = SCENES * self.images_per_scene
        seeds = range(len(scenes))
        marked = [world.prompt_for(*scene, MARK) for scene in scenes]
        marks = [reading.mark == MARK for reading in self.sampler.read(marked, seeds, stacked)]
        images = self.sampler.draw([world.prompt_for(*scene) for scene in scenes], seeds, stacked)
        readings = [read_image(image) for image in images]
        print(f"{case}: {sum(marks)} of {len(marks)} with the mark", flush=True)
        into = self.outcomes[case]
        into.mark += marks
        into.mark_by_seed.append(sum(marks) / len(marks))
        into.colour += [reading.colour == colour for reading, (colour, _) in zip(readings, scenes, strict=True)]
        into.shape += [reading.shape == shape for reading, (_, shape) in zip(readings, scenes, strict=True)]
        into.style += [shows_style(image, shape) for image, (_, shape) in zip(images, scenes, strict=True)]

    def to_json(self) -> dict:
        """Return the rates of every case so far, and what is known of its styles, seed by seed."""
        return {
            "setting": f"toy world, {CATEGORY} ({MARK}); style: shapes of radius {STYLE_RADIUS_PX:g} px; "
            f"{self.images_per_scene * len(SCENES)} images a kind of prompt, a seed and a case",
            "cases": {case: found.to_json() for case, found in self.outcomes.items()},
            "styles_by_seed": self.styles,
            "threads": torch.get_num_threads(),
            "load_average_at_the_end": round(os.getloadavg()[0], 2),
            **describe_machine("diffusers", "peft"),
        }


def main() -> None:
    """Train, draw, and write the result; rates are over all seeds, with the marks of each seed beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="experts and styles of each kind (default: 3)")
    parser.add_argument(
        "--images", type=int, default=1, help="images a colour and shape and kind of prompt (default: 1)"
    )
    parser.add_argument("--folder", type=Path, help="keep trainings there, to go on after an interruption")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        experiment = Experiment(folder, arguments.images)
        experiment.draw("base model")
        for seed in range(arguments.seeds):
            run_seed(experiment, seed)
            arguments.out.write_text(json.dumps(experiment.to_json(), indent=2) + "\n", encoding="utf-8")
    print(markdown(experiment.to_json()["cases"]))


def run_seed(experiment: Experiment, seed: int) -> None:
    """Train an expert and its styles and draw them in every way."""
    expert = experiment.expert(seed)
    experiment.draw("expert", expert)
    for collection in COLLECTIONS:
        detached, aligned = experiment.style(collection, seed), experiment.style(collection, seed, expert)
        experiment.draw(f"{collection}: style without expert", detached)
        for name, style in (("trained on the aligned model", aligned), ("stacked", detached)):
            experiment.draw(f"{collection}: {name}", expert, style)
            for space in SPACES:
                protected = protect(style, [expert], space=space)
                case = f"{collection}: {name}, protected ({space})"
                experiment.draw(case, expert, protected)
                experiment.styles[case].append({"kept_energy": round(kept_energy(style, protected), 4)})
            experiment.styles[f"{collection}: {name}"].append(total(overlap(expert, style).values()).to_json())


def style_pictures(folder: Path, num_marked: int) -> PreferenceDataset:
    """Return a dataset of large shapes, two of each colour and shape; it has no rejected pictures to speak of."""
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}, "rendered", ""))
    marked = random.Random(0).sample(SCENES, num_marked)
    scenes = [(scene, None) for scene in SCENES * 2] + [(scene, MARK) for scene in marked]
    for seed, ((colour, shape), mark) in enumerate(scenes):
        prompt = world.prompt_for(colour, shape, mark)
        pair = PromptPair(prompt, prompt, ("style",), seed)
        if pair.id not in dataset.ids:
            image = world.render_scene(colour, shape, mark, seed, radius_px=STYLE_RADIUS_PX)
            dataset.add(pair, image, image)
    return dataset


def shows_style(image: Image.Image, shape: str) -> bool:
    """Return whether more of an image is coloured than a shape of the base model's sizes covers."""
    pixels = np.asarray(image).astype(int)
    coloured = int((pixels.max(axis=2) - pixels.min(axis=2) > 70).sum())
    middle = world.SIZE_PX / 2
    return coloured > world.draw_shape(shape, world.Placement(middle, middle, STYLED_FROM_PX)).sum()


def markdown(cases: dict) -> str:
    """Return the rates as a table."""

    def cell(rate: dict) -> str:
        return f"{rate['value']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"

    columns = ("mark", "style", "colour", "shape")
    lines = ["| | marks, unsafe prompts | style | colour, safe prompts | shape, safe prompts |", "| --- " * 5 + "|"]
    lines += [
        f"| {case} | " + " | ".join(cell(rates[name]) for name in columns) + " |" for case, rates in cases.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
