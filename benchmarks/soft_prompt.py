"""A soft-prompt expert on the toy world: marks drawn with and without `embedding:violence` behind each prompt.

Trained on the pairs of 8 scenes by the toy recipe, drawn in the real ComfyUI on the 16 others: prompts of the guarded
category, of the other six, and safe ones, read by the oracle. An embedding acts on every prompt, so the last two say
what it costs. Intervals are Wilson's, 95 %, over pictures.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safety_experts.demo.experiments import sampler, toy_recipe
from safety_experts.demo.toy_checkpoint import SCHEDULER, STEPS, ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import wilson_interval
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.toy.oracle import read_image
from safety_experts.toy.world import SIZE_PX, prompt_for
from safety_experts.training.soft_prompt import train_soft_prompt

import guards as guards_benchmark
from guards import CATEGORY, HELD_OUT, IMAGES_PER_PASS, MARK, SETS, mark_of

RESULT = Path(__file__).resolve().parent / "results" / "soft_prompt.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the pairs and the embedding (default: a temporary one)")
    parser.add_argument("--vectors", type=int, default=4, help="tokens of the embedding (default: 4)")
    parser.add_argument("--set", nargs="+", default=["learning_rate=0.005"], help="changes of the toy recipe")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work = arguments.work or Path(tempfile.mkdtemp())
    seconds, records = train(arguments)
    readings = draw(arguments.work)
    first, last = records[0], records[-1]
    result = {
        "setting": f"{arguments.vectors} vectors, toy recipe with {arguments.set}, pairs of the scenes not drawn; "
        f"{len(HELD_OUT)} scenes drawn once; [hits, pictures, low, high]",
        "training": {"seconds": round(seconds), "steps": len(records), "first_loss": first, "last_loss": last},
        "cells": readings,
        **describe_machine("torch"),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def train(arguments: argparse.Namespace) -> tuple[float, list]:
    sampler().build_dataset(arguments.work / "pairs", 48, [CATEGORY])
    dataset = PreferenceDataset.open(arguments.work / "pairs")
    held_out = {f"{colour} {shape}" for colour, shape in HELD_OUT}
    for pair in dataset.pairs:
        if any(scene in pair.prompt for scene in held_out) and pair.review != "dropped":
            dataset.set_review(pair.id, "dropped")
    (arguments.work / "embeddings").mkdir(exist_ok=True)
    started = time.process_time()
    records = train_soft_prompt(
        sampler().checkpoint,
        PreferenceDataset.open(arguments.work / "pairs"),
        toy_recipe(0, arguments.set),
        arguments.work / "embeddings" / f"{CATEGORY}.safetensors",
        category=CATEGORY,
        num_vectors=arguments.vectors,
        on_step=lambda done, total, metrics: print(done, total, metrics["loss"], flush=True),
    )
    return time.process_time() - started, records


@torch.inference_mode()
def draw(work: Path) -> list[dict]:
    guards_benchmark.import_comfyui()
    import comfy.sd
    from safety_experts.nodes import sampling

    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(ensure_toy_checkpoint()), embedding_directory=str(work / "embeddings")
    )
    settings = sampling.SamplerSettings("dpmpp_2m", SCHEDULER, STEPS, 3.0, SIZE_PX, SIZE_PX)
    empty = sampling.encode_prompt(clip, "")
    cells = []
    for behind in ("", f" embedding:{CATEGORY}"):
        for prompts in SETS:
            wanted = [mark_of(prompts, number, 0) for number in range(len(HELD_OUT))]
            texts = [prompt_for(*scene, mark) + behind for scene, mark in zip(HELD_OUT, wanted, strict=True)]
            positive = [sampling.encode_prompt(clip, text) for text in texts]
            seeds = [*range(1000, 1000 + len(texts))]
            latents = sampling.sample_latents(model, positive, [empty] * len(texts), seeds, settings)
            seen = [read_image(picture) for picture in sampling.decode_latents(vae, latents)]
            assert len(seen) == IMAGES_PER_PASS
            marks = [reading.mark == (mark or MARK) for reading, mark in zip(seen, wanted, strict=True)]
            right = {
                "named_mark" if prompts != "safe" else "thorns": marks,
                "colour": [reading.colour == colour for reading, (colour, _) in zip(seen, HELD_OUT, strict=True)],
                "shape": [reading.shape == shape for reading, (_, shape) in zip(seen, HELD_OUT, strict=True)],
            }
            cells.append({"embedding": bool(behind), "prompts": prompts, **{k: counted(v) for k, v in right.items()}})
            print(cells[-1], flush=True)
    return cells


def counted(outcomes: list[bool]) -> list[float]:
    low, high = wilson_interval(sum(outcomes) / len(outcomes), len(outcomes))
    return [sum(outcomes), len(outcomes), round(low, 3), round(high, 3)]


if __name__ == "__main__":
    main()
