"""Verifier heads against the toy world's oracle, on scenes they were not fitted to.

The features are those of a small CLIP Vision of random weights, which nobody would use: what is measured is the
fitting, the thresholds, and how far random features carry. A trained CLIP is not measured here.

The dataset is the toy's: an unsafe and a safe picture of every pair, drawn by the toy model. Heads are fitted to the
pairs of 16 scenes; of the pictures of the other 8, those are counted in which a head and the oracle agree.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safety_experts.demo.experiments import sampler
from safety_experts.evaluation.judges.clip_encoder import ClipFolder
from safety_experts.evaluation.judges.q16_vectors import probe_image
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import rate_of
from safety_experts.guards.verifier import fit_verifier
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.preferences.images import read_image as load_image
from safety_experts.toy.oracle import read_image
from safety_experts.toy.world import COLOURS, MARKS, SHAPES

RESULT = Path(__file__).resolve().parent / "results" / "verifier.json"
SCENES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
HELD_OUT = SCENES[::3]
SIZES = {"narrow": (64, 64), "wide": (256, 768)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the dataset (default: a temporary one)")
    parser.add_argument("--dataset", type=Path, help="a dataset of the toy world (default: drawn in --work)")
    parser.add_argument("--pairs", type=int, default=48, help="of each category, where it is drawn (default: 48)")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"JSON to write (default: {RESULT})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.dataset or (arguments.work or Path(temporary)) / "pairs"
        if arguments.dataset is None:
            sampler().build_dataset(folder, arguments.pairs)
        pictures = load(PreferenceDataset.open(folder))
        results = {name: measure(pictures, Path(temporary) / name, *sizes) for name, sizes in SIZES.items()}
    result = {
        "setting": f"{len(pictures)} pictures of the toy model, heads fitted to 16 scenes, read on {len(HELD_OUT)} "
        "others; random CLIP Vision (hidden, projection): " + json.dumps(SIZES),
        "encoders": results,
        **describe_machine("transformers"),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def load(dataset: PreferenceDataset) -> list[tuple]:
    """Return (picture, what the pair says it shows, what the oracle sees, scene) of both pictures of every pair."""
    by_mark = {mark: category for category, mark in MARKS.items()}
    found = []
    for pair in dataset.pairs:
        chosen, rejected = map(load_image, dataset.image_paths(pair))
        scene = next(name for name in SCENES if name in pair.prompt)
        for picture, shown in ((chosen, frozenset()), (rejected, frozenset(pair.categories))):
            found.append((picture, shown, by_mark.get(read_image(picture).mark), scene))
    return found


def measure(pictures: list[tuple], folder: Path, hidden: int, projection: int) -> dict:
    encoder = random_clip(folder, hidden, projection)
    started = time.process_time()
    features = torch.cat(
        [encoder.embed_images([p[0] for p in pictures[start : start + 32]]) for start in range(0, len(pictures), 32)]
    )
    embedded = time.process_time()
    is_new = torch.tensor([scene in HELD_OUT for *_, scene in pictures])
    known = [picture for picture, new in zip(pictures, is_new, strict=True) if not new]
    verifier = fit_verifier(
        features[~is_new],
        [shown for _, shown, _, _ in known],
        [scene for *_, scene in known],
        encoder.embed_images([probe_image()])[0],
        encoder.version,
    )
    fitted = time.process_time()
    found = verifier.scores(features[is_new]) > 0
    seen = [mark for (_, _, mark, _), new in zip(pictures, is_new, strict=True) if new]
    heads = {}
    for column, name in enumerate(verifier.categories):
        truth = [category == name for category in seen]
        says = found[:, column].tolist()
        heads[name] = {
            "accuracy": rate_of([a == b for a, b in zip(says, truth, strict=True)]).to_json(),
            "recall": rate_of([a for a, b in zip(says, truth, strict=True) if b]).to_json(),
            "false_positives": rate_of([a for a, b in zip(says, truth, strict=True) if not b]).to_json(),
            "predicted_by_the_fit": verifier.heads[column].model_dump(exclude={"category", "threshold"}),
        }
    any_head = rate_of([bool(row.any()) == (mark is not None) for row, mark in zip(found, seen, strict=True)])
    return {
        "any_category_accuracy": any_head.to_json(),
        "heads": heads,
        "cpu_milliseconds_a_picture": round(1000 * (embedded - started) / len(pictures), 2),
        "cpu_seconds_to_fit": round(fitted - embedded, 2),
    }


def random_clip(folder: Path, hidden: int, projection: int) -> ClipFolder:
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=4, image_size=64,
        patch_size=8, projection_dim=projection, initializer_factor=8.0,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return ClipFolder(folder, "cpu")


if __name__ == "__main__":
    main()
