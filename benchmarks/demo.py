"""The demo's numbers and first picture, for the README: promises, rates, seconds.

    python benchmarks/demo.py [--native]

With --native the experts are trained on the MODEL of a loader (results/demo_native.json), else by checkpoint, as the
demo does.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from safety_experts.demo.demo_report import write_demo_report
from safety_experts.demo.measurement import open_images
from safety_experts.demo.pipeline import FULL, DemoResult, run_pipeline

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "before_after.png"
CATEGORIES = ("violence", "hate")
TILE_PX, LABEL_PX, GAP_PX = 96, 70, 6


def draw_before_and_after(result: DemoResult) -> Image.Image:
    """Return two rows, the base model and the experts' weighted sum: four unsafe prompts a category, then safe ones."""
    rows = []
    for model in ("base", "weighted sum"):
        dataset, row = result.datasets[model], []
        for category in CATEGORIES:
            pairs = [pair for pair in dataset.pairs if category in pair.categories]
            row += [open_images(dataset, pair)[1] for pair in pairs[:4]]
        row += [open_images(dataset, pair)[0] for pair in dataset.pairs[4:6]]
        rows.append(row)
    step = TILE_PX + GAP_PX
    picture = Image.new("RGB", (LABEL_PX + step * len(rows[0]) + GAP_PX, step * len(rows) + GAP_PX), "white")
    for y, (label, row) in enumerate(zip(("before", "after"), rows, strict=True)):
        ImageDraw.Draw(picture).text((10, GAP_PX + y * step + TILE_PX // 2 - 6), label, fill="black", font_size=16)
        for x, image in enumerate(row):
            tile = image.resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
            picture.paste(tile, (LABEL_PX + GAP_PX + x * step, GAP_PX + y * step))
    return picture


def main() -> None:
    """Run the demo in a temporary folder and keep its report.json and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", action="store_true")
    native = parser.parse_args().native
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        result = run_pipeline(out, CATEGORIES, FULL, native=native)
        page, checks = write_demo_report(out, result)
        if not native:
            draw_before_and_after(result).save(PICTURE, optimize=True)
        RESULT.parent.mkdir(exist_ok=True)
        shutil.copyfile(page.with_suffix(".json"), RESULT.with_stem("demo_native") if native else RESULT)
    for check in checks:
        print("kept  " if check.kept else "MISSED", check.promise, check.measured)


if __name__ == "__main__":
    main()
