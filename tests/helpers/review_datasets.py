"""Toy datasets to review: pictures of the toy world, scores and flags as judges leave them, some pairs spoiled."""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safety_experts.preferences.dataset import DatasetInfo
from safety_experts.preferences.records import PreferencePair
from safety_experts.toy.world import COLOURS, MARKS, SHAPES, prompt_for, render_scene

ROOT = Path(__file__).resolve().parents[2]


def make_review_dataset(folder: Path, num_pairs: int, size_px: int = 64, spoiled: float = 0.0) -> Path:
    """Write a dataset in one go (without the syncing of `add`); return its folder.

    Args:
        size_px: width and height of the pictures, drawn at 64 and enlarged.
        spoiled: the share of pairs whose two pictures are exchanged on purpose; the scores say so.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "dataset.json").write_text(DatasetInfo({}, {}, "toy world", "CC0").to_json(), encoding="utf-8")
    draws = random.Random(0)
    lines = []
    for index in range(num_pairs):
        colour, shape = draws.choice(list(COLOURS)), draws.choice(SHAPES)
        category = draws.choice(list(MARKS))
        is_spoiled = draws.random() < spoiled
        pair_id = f"{index:016x}"
        for side, marked in (("chosen", is_spoiled), ("rejected", not is_spoiled)):
            picture = render_scene(colour, shape, MARKS[category] if marked else None, seed=index)
            if size_px != picture.width:
                picture = picture.resize((size_px, size_px), Image.Resampling.BICUBIC)
            picture.save(folder / "images" / f"{pair_id}-{side}.png", compress_level=1)
        pair = PreferencePair(
            id=pair_id,
            prompt=prompt_for(colour, shape, MARKS[category]),
            safe_prompt=prompt_for(colour, shape),
            categories=(category,),
            chosen_file_name=f"images/{pair_id}-chosen.png",
            rejected_file_name=f"images/{pair_id}-rejected.png",
            chosen_unsafe=is_spoiled,
            rejected_unsafe=not is_spoiled,
            seed=index,
            width_px=size_px,
            height_px=size_px,
            scores={
                "toy-oracle/chosen": float(is_spoiled),
                "toy-oracle/rejected": float(not is_spoiled),
                f"toy-oracle/chosen/{category}": float(is_spoiled),
                f"toy-oracle/rejected/{category}": float(not is_spoiled),
            },
        )
        lines.append(pair.to_json() + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def reviews_on_disk(folder: Path) -> dict[str, str | None]:
    """Return pair id -> review, as metadata.jsonl says."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["review"] for line in map(json.loads, lines)}


class ReviewCommand:
    """`safety-experts review` in a process of its own, inside the `with` block.

    Args:
        port: 0 for any free one; `url` says which.
    """

    def __init__(self, folder: Path, port: int = 0):
        self._command = [sys.executable, str(ROOT / "cli.py"), "review", str(folder), "--port", str(port), "--json"]

    def __enter__(self) -> "ReviewCommand":
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
        )
        assert self.process.stdout and self.process.stderr
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.url: str = json.loads(line)["url"]
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()
