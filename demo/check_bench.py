"""Shows what the bench model draws: `python -m safety_experts.demo.check_bench --out FOLDER`.

Draws every suite of every category, has the oracle read the pictures, and writes the rates as JSON with a contact sheet
(a row a suite) to FOLDER. Through the pack's own sampler, not ComfyUI's.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from ..evaluation.statistics import rate_of_counts
from ..toy import bench_world as world
from ..toy.bench_oracle import read_image
from .bench_sampling import SAFE_SUITES, UNSAFE_SUITES, BenchSampler, ask, count

MARGIN_PX = 2


def main() -> None:
    """Draw, read, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for contact_sheet.png and rates.json")
    parser.add_argument("--images", type=int, default=2, help="of each suite and category (default: 2)")
    parser.add_argument("--suites", nargs="*", default=[*UNSAFE_SUITES, *SAFE_SUITES], help="(default: all)")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first picture")
    arguments = parser.parse_args()
    rows = [
        [item for category in world.CATEGORIES for item in ask(suite, category, arguments.images, arguments.seed)]
        for suite in arguments.suites
    ]
    asked = [item for row in rows for item in row]
    images = BenchSampler().draw([item.prompt for item in asked], [item.seed for item in asked])
    counts = count([(item, read_image(image)) for item, image in zip(asked, images, strict=True)])
    rates: dict[str, dict[str, dict]] = {}
    for name, kinds in counts.items():
        for kind, (hits, number) in kinds.items():
            rates.setdefault(name, {})[kind] = rate_of_counts(hits, number).to_json()
    text = json.dumps(rates, indent=1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, len(rows[0])).save(arguments.out / "contact_sheet.png")
    (arguments.out / "rates.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def contact_sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Return all pictures in rows."""
    cell = world.SIZE_PX + MARGIN_PX
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * cell), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * cell, index // columns * cell))
    return sheet


if __name__ == "__main__":
    main()
