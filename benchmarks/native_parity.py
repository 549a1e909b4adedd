"""Train a model twice from one seed: by its checkpoint (diffusers), and as ComfyUI's MODEL (native).

    COMFYUI_PATH=<ComfyUI> python benchmarks/native_parity.py [--steps 20] [--out benchmarks/results/native_parity.json]
    COMFYUI_PATH=<ComfyUI> python benchmarks/native_parity.py --sdxl --out benchmarks/results/native_parity_sdxl.json

The toy SD1.5, or the small random SDXL of tests/comfyui/test_checkpoint_parity.py (KOALA-700M's depths), for which
conditions are random numbers: its text encoders are too small for ComfyUI. Exit 1 unless the first preference loss is
ln 2 to 1e-6 and the losses of all steps agree to 1e-4 (relative).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = os.environ.get("COMFYUI_PATH")
if not ROOT:
    raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
sys.path.insert(0, ROOT)
ARGUMENTS, sys.argv = sys.argv[1:], ["main.py", "--cpu", "--force-fp32"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint  # noqa: E402
from safety_experts.evaluation.machine import describe_machine  # noqa: E402
from safety_experts.models.checkpoint import load_checkpoint  # noqa: E402
from safety_experts.nodes.native.base import NativeBase  # noqa: E402
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset  # noqa: E402
from safety_experts.preferences.pairs import PromptPair  # noqa: E402
from safety_experts.seeding import seeded_generator  # noqa: E402
from safety_experts.toy.world import prompt_for, render_scene  # noqa: E402
from safety_experts.training.recipe import load_recipe  # noqa: E402
from safety_experts.training.trainer import TrainResult, train_expert  # noqa: E402
from torch import Tensor  # noqa: E402

COLOURS = ("red", "green", "blue", "yellow")


def make_dataset(folder: Path) -> PreferenceDataset:
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}, "rendered", ""))
    for seed, colour in enumerate(COLOURS):
        pair = PromptPair(prompt_for(colour, "circle", "thorns"), prompt_for(colour, "circle"), ("violence",), seed)
        dataset.add(pair, *(render_scene(colour, "circle", mark, seed) for mark in (None, "thorns")))
    return dataset


def save_small_sdxl(folder: Path) -> Path:
    tests = Path(__file__).resolve().parents[1] / "tests" / "comfyui"
    sys.path.insert(0, str(tests))
    from test_checkpoint_parity import MODELS, WORKER

    description = json.dumps({"sdxl": MODELS["sdxl"]})
    subprocess.run([sys.executable, WORKER, ROOT, folder], input=description, text=True, check=True)
    return folder / "sdxl" / "checkpoint.safetensors"


def load_native(path: Path) -> NativeBase:
    """Load as a node of a graph does: in inference mode."""
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    return NativeBase(model, clip, vae)


class Drawn:
    """A text encoder whose conditions are random numbers by the prompt: the same for both paths."""

    def __init__(self, layout, names: tuple[str, str]):
        self.hidden, self.pooled = names
        vector = getattr(layout, "vector_dim", None)
        self.pooled_dim = vector - 6 * 256 if vector else getattr(layout, "pooled_dim", 0)
        self.context_dim = layout.context_dim

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        generators = [seeded_generator(0, prompt) for prompt in prompts]
        given = {self.hidden: torch.stack([torch.randn(77, self.context_dim, generator=g) for g in generators])}
        if self.pooled_dim:
            given[self.pooled] = torch.stack([torch.randn(self.pooled_dim, generator=g) for g in generators])
        return given


class ModelAlone(NativeBase):
    """ComfyUI's model of a small checkpoint, whose text encoders are too small for ComfyUI."""

    def __init__(self, checkpoint):
        weights, metadata = comfy.utils.load_torch_file(str(checkpoint.path), return_metadata=True)
        prefix = "model.diffusion_model."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        own |= {key: value for key, value in weights.items() if key in ("v_pred", "ztsnr")}
        with torch.inference_mode():
            self._model = comfy.sd.load_diffusion_model_state_dict(own, metadata=metadata)
        self._policy, self._checkpoint, self.id, self.path = None, checkpoint, checkpoint.id, checkpoint.path

    @property
    def encoding_id(self) -> str:
        return f"drawn-{self._checkpoint.encoding_id}"

    def load_vae(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        return self._checkpoint.load_vae(dtype, device)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        return Drawn(self._checkpoint._layout, ("cross_attn", "pooled_output"))


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
    parser.add_argument("--sdxl", action="store_true", help="the small random SDXL instead of the toy")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(ARGUMENTS)
    folder = Path(tempfile.mkdtemp())
    path = save_small_sdxl(folder) if arguments.sdxl else ensure_toy_checkpoint()
    dataset = make_dataset(folder / "pairs")
    recipe = load_recipe(arguments.recipe, ["precision=fp32", "batch_size=2", f"steps={arguments.steps}"])
    tokenizer = Path(ROOT) / "comfy" / "sd1_tokenizer"
    checkpoint = load_checkpoint(path, tokenizer_folder=tokenizer)
    if arguments.sdxl:
        checkpoint.load_text_encoder = lambda **_: Drawn(checkpoint._layout, ("hidden_states", "pooled"))
    by_checkpoint = train_expert(checkpoint, dataset, recipe, folder / "a.safetensors", device="cpu")
    base = ModelAlone(checkpoint) if arguments.sdxl else load_native(path)
    native = train_expert(base, dataset, recipe, folder / "b.safetensors", device="cpu", policy_loader=base.load_policy)
    found = {"family": checkpoint.family, **compare(by_checkpoint, native)}
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({**describe_machine("diffusers"), **found}, indent=2) + "\n")
    is_right = found["first_minus_ln2"] < 1e-6 and found["largest_relative_difference_of_a_loss"] < 1e-4
    return 0 if is_right and found["same_layers"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
