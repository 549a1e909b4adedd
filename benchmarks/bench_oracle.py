"""How often the bench world's oracle is wrong, on rendered scenes whose content is known: clean, blurred and noisy.

    python benchmarks/bench_oracle.py [--scenes 500]

Writes results/bench_oracle.json. Scenes are drawn evenly over signs, styles and grounds, with seeds that neither the
model's training nor the oracle's tests use. Where the bench's autoencoder has been trained, also after it: that error
is the autoencoder's and the oracle's together, and a floor for every rate measured on the model's pictures.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safety_experts.demo.bench_checkpoint import bench_folder
from safety_experts.demo.train_bench import prepare
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import rate_of_counts
from safety_experts.toy import bench_world as world
from safety_experts.toy.bench_oracle import read_image

RESULT = Path(__file__).resolve().parent / "results" / "bench_oracle.json"
FIRST_SEED = 70_000_000
Degrade = Callable[[Image.Image, int], Image.Image]


def degraded(blur_px: float, noise: float) -> Degrade:
    """Return what blurs (Gaussian, of that radius) and adds noise (of that deviation, of 255)."""

    def degrade(image: Image.Image, seed: int) -> Image.Image:
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur_px)), dtype=float)
        pixels = pixels + np.random.default_rng(seed).normal(0, noise, pixels.shape)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    return degrade


def through_autoencoder() -> Degrade | None:
    """Return what encodes and decodes, or None where the autoencoder has not been trained."""
    if not (bench_folder() / "autoencoder.safetensors").exists():
        return None
    vae = prepare(bench_folder()).load_vae()

    def degrade(image: Image.Image, seed: int) -> Image.Image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return vae.decode_images(vae.encode_images(pixels))[0]

    return degrade


def main() -> None:
    """Read and count, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500, help="for each degradation (default: 500)")
    number = parser.parse_args().scenes
    kinds: dict[str, Degrade | None] = {
        "clean": lambda image, seed: image,
        "blur 1.5 px": degraded(1.5, 0),
        "noise 20": degraded(0, 20),
        "blur 1.5 px, noise 10": degraded(1.5, 10),
        "blur 2.5 px, noise 10": degraded(2.5, 10),
        "autoencoder": through_autoencoder(),
    }
    errors = {name: errors_of(degrade, number) for name, degrade in kinds.items() if degrade}
    result = {"scenes": number, "errors": errors, **describe_machine("Pillow")}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(errors, indent=1))


def errors_of(degrade: Degrade, number: int) -> dict:
    """Return the rates of what is read wrong."""
    draws = random.Random(FIRST_SEED)
    counts = {"missed mark": [0, 0], "mark where none is": [0, 0], "other sign": [0, 0], "object": [0, 0]}
    for index in range(number):
        scene = world.draw_scene(draws, (*world.SIGNS, None)[index % (len(world.SIGNS) + 1)])
        seen = read_image(degrade(world.render_scene(scene, FIRST_SEED + index), index))
        outcomes = {
            "missed mark": (scene.is_unsafe, seen.sign != scene.sign),
            "mark where none is": (not scene.is_unsafe, seen.is_unsafe),
            "other sign": (not scene.is_unsafe, seen.sign != scene.sign),
        }
        for name, (is_case, is_wrong) in outcomes.items():
            counts[name][0] += is_case and is_wrong
            counts[name][1] += is_case
        for wanted, found in ((scene.left, seen.left), (scene.right, seen.right)):
            counts["object"][0] += sum(one != other for one, other in zip(wanted, found, strict=True))
            counts["object"][1] += 2
    return {name: rate_of_counts(hits, of).to_json() for name, (hits, of) in counts.items()}


if __name__ == "__main__":
    main()
