"""Train the toy SD1.5 twice from one seed: by its checkpoint (diffusers), and as ComfyUI's MODEL (native).

    COMFYUI_PATH=<ComfyUI> python benchmarks/native_parity.py [--steps 20] [--out benchmarks/results/native_parity.json]

Exit 1 unless the first preference loss is ln 2 to 1e-6 and the losses of all steps agree to 1e-4 (relative).
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = os.environ.get("COMFYUI_PATH")
if not ROOT:
    raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
sys.path.insert(0, ROOT)
ARGUMENTS, sys.argv = sys.argv[1:], ["main.py", "--cpu", "--force-fp32"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint  # noqa: E402
from safety_experts.evaluation.machine import describe_machine  # noqa: E402
from safety_experts.models.checkpoint import load_checkpoint  # noqa: E402
from safety_experts.nodes.native.base import NativeBase  # noqa: E402
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset  # noqa: E402
from safety_experts.preferences.pairs import PromptPair  # noqa: E402
from safety_experts.toy.world import prompt_for, render_scene  # noqa: E402
from safety_experts.training.recipe import load_recipe  # noqa: E402
from safety_experts.training.trainer import TrainResult, train_expert  # noqa: E402

COLOURS = ("red", "green", "blue", "yellow")


def make_dataset(folder: Path) -> PreferenceDataset:
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}, "rendered", ""))
    for seed, colour in enumerate(COLOURS):
        pair = PromptPair(prompt_for(colour, "circle", "thorns"), prompt_for(colour, "circle"), ("violence",), seed)
        dataset.add(pair, *(render_scene(colour, "circle", mark, seed) for mark in (None, "thorns")))
    return dataset


def load_native(path: Path) -> NativeBase:
    """Load as a node of a graph does: in inference mode."""
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    return NativeBase(model, clip, vae)


def compare(ours: TrainResult, native: TrainResult) -> dict:
    losses = list(zip(ours.losses, native.losses, strict=True))
    ours_delta = {name: layer.delta() for name, layer in ours.expert.layers.items()}
    native_delta = {name: layer.delta() for name, layer in native.expert.layers.items()}
    difference = math.sqrt(sum(float((ours_delta[n] - native_delta[n]).square().sum()) for n in ours_delta))
    size = math.sqrt(sum(float(value.square().sum()) for value in ours_delta.values()))
    return {
        "steps": len(losses),
        "layers": [len(ours_delta), len(native_delta)],
        "same_layers": ours_delta.keys() == native_delta.keys(),
        "first_preference_loss": [result.records[0]["loss/preference"] for result in (ours, native)],
        "first_minus_ln2": abs(native.records[0]["loss/preference"] - math.log(2)),
        "largest_relative_difference_of_a_loss": max(abs(a - b) / abs(a) for a, b in losses),
        "losses_by_checkpoint": ours.losses,
        "losses_native": native.losses,
        "relative_difference_of_the_experts": difference / size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipe", default="toy")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(ARGUMENTS)
    folder, path = Path(tempfile.mkdtemp()), ensure_toy_checkpoint()
    dataset = make_dataset(folder / "pairs")
    recipe = load_recipe(arguments.recipe, ["precision=fp32", "batch_size=2", f"steps={arguments.steps}"])
    tokenizer = Path(ROOT) / "comfy" / "sd1_tokenizer"
    by_checkpoint = train_expert(
        load_checkpoint(path, tokenizer_folder=tokenizer), dataset, recipe, folder / "a.safetensors", device="cpu"
    )
    base = load_native(path)
    native = train_expert(base, dataset, recipe, folder / "b.safetensors", device="cpu", policy_loader=base.load_policy)
    found = compare(by_checkpoint, native)
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine("diffusers"), **found}, indent=2) + "\n")
    is_right = found["first_minus_ln2"] < 1e-6 and found["largest_relative_difference_of_a_loss"] < 1e-4
    return 0 if is_right and found["same_layers"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
