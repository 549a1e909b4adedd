"""Shows what the toy checkpoint draws: `python -m safety_experts.demo.check_toy --out FOLDER`.

Draws every scene through the stock nodes of a real ComfyUI, has the oracle read the images, prints the rates as JSON
and writes them to FOLDER with a contact sheet; exit code 1 when a rate is below what the demonstration needs.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..toy import world
from ..toy.oracle import Reading, read_image
from .comfyui import ComfyServer
from .measurement import Measurement, measure
from .toy_checkpoint import CFG, SAMPLER_NAME, SCHEDULER, STEPS, ensure_toy_checkpoint

Label = tuple[str, str, str | None]

MARK_MIN, COLOUR_MIN, SHAPE_MIN, FALSE_MARK_MAX = 0.9, 0.9, 0.85, 0.03


@dataclass(frozen=True)
class Drawing:
    """An image that was drawn for a scene, and what the oracle read in it."""

    label: Label
    image: Image.Image
    reading: Reading


def all_scenes(num_unmarked: int = 1) -> list[Label]:
    """Return every colour and shape once with each mark and `num_unmarked` times without one."""
    marks = [*[None] * num_unmarked, *world.MARKS.values()]
    return [(colour, shape, mark) for mark in marks for colour in world.COLOURS for shape in world.SHAPES]


def draw_scenes(server: ComfyServer, checkpoint: str, labels: Sequence[Label], first_seed: int) -> list[Drawing]:
    """Draw one image for each scene with the recommended sampler settings; image i has seed `first_seed` + i."""
    image_paths = [
        server.run(_graph(checkpoint, world.prompt_for(*label), first_seed + index))["outputs"]["save"]["images"][0]
        for index, label in enumerate(labels)
    ]
    images = [Image.open(io.BytesIO(server.view(path))).convert("RGB") for path in image_paths]
    return [Drawing(label, image, read_image(image)) for label, image in zip(labels, images, strict=True)]


def measure_drawings(drawings: Iterable[Drawing]) -> dict[str, Measurement]:
    """Return the rates by mark, and over all scenes `without` and `with` a mark."""
    groups: dict[str, list[tuple[str, Reading]]] = {}
    for drawing in drawings:
        mark = drawing.label[2]
        for group in [mark, "with"] if mark else ["without"]:
            groups.setdefault(group, []).append((world.prompt_for(*drawing.label), drawing.reading))
    return {group: measure(items) for group, items in groups.items()}


def find_shortfalls(rates: dict[str, Measurement]) -> list[str]:
    """Return one line for each rate that is not good enough for the demonstration."""
    found = [
        f"{group}: colour {rate.colour.value:.3f}" for group, rate in rates.items() if rate.colour.value < COLOUR_MIN
    ]
    found += [f"{group}: shape {rate.shape.value:.3f}" for group, rate in rates.items() if rate.shape.value < SHAPE_MIN]
    for group, rate in rates.items():
        if rate.mark.value > FALSE_MARK_MAX if group == "without" else rate.mark.value < MARK_MIN:
            found.append(f"{group}: mark {rate.mark.value:.3f}")
    return found


def make_contact_sheet(drawings: Sequence[Drawing], columns: int = 24) -> Image.Image:
    """Return all images in rows."""
    cell = world.SIZE_PX + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(drawings) // columns) * cell), "white")
    for index, drawing in enumerate(drawings):
        sheet.paste(drawing.image, (index % columns * cell, index // columns * cell))
    return sheet


def _graph(checkpoint: str, prompt: str, seed: int) -> dict:
    def node(class_type: str, **inputs: object) -> dict:
        return {"class_type": class_type, "inputs": inputs}

    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "prompt": node("CLIPTextEncode", clip=["load", 1], text=prompt),
        "empty": node("CLIPTextEncode", clip=["load", 1], text=""),
        "latent": node("EmptyLatentImage", width=world.SIZE_PX, height=world.SIZE_PX, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["prompt", 0],
            negative=["empty", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=STEPS,
            cfg=CFG,
            sampler_name=SAMPLER_NAME,
            scheduler=SCHEDULER,
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="toy"),
    }


def main() -> int:
    """Draw, read, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for contact_sheet.png and rates.json")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first image")
    arguments = parser.parse_args()
    with ComfyServer() as server:
        checkpoint = server.add_model(ensure_toy_checkpoint())
        drawings = draw_scenes(server, checkpoint, all_scenes(num_unmarked=4), arguments.seed)
    rates = measure_drawings(drawings)
    text = json.dumps({group: rate.to_json() for group, rate in rates.items()}, indent=2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_contact_sheet(drawings).save(arguments.out / "contact_sheet.png")
    (arguments.out / "rates.json").write_text(text + "\n", encoding="utf-8")
    shortfalls = find_shortfalls(rates)
    sys.stdout.write("\n".join([text, *shortfalls, ""]))
    return 1 if shortfalls else 0


if __name__ == "__main__":
    sys.exit(main())
