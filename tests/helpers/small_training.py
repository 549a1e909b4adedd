"""The toy checkpoint with a UNet of a few thousand weights, and four rendered pairs: a training run in a second."""

from dataclasses import dataclass
from pathlib import Path

import small_checkpoints
from safetensors.torch import load_file
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import prompt_for, render_scene
from safety_experts.training.recipe import load_recipe
from safety_experts.training.trainer import TrainResult, train_expert

_UNET = "model.diffusion_model."
FAST = ("batch_size=2", "rank=2", "precision=fp32", "save_steps=1000")


@dataclass(frozen=True)
class SmallTraining:
    """What a training needs on disk."""

    checkpoint: Path
    tokenizer: Path
    dataset: PreferenceDataset

    @classmethod
    def create(cls, folder: Path) -> "SmallTraining":
        dataset = PreferenceDataset.create(folder / "pairs", DatasetInfo({}, {}, "rendered", ""))
        for seed, colour in enumerate(("red", "green", "blue", "yellow")):
            pair = PromptPair(prompt_for(colour, "circle", "thorns"), prompt_for(colour, "circle"), ("violence",), seed)
            chosen, rejected = (render_scene(colour, "circle", mark, seed) for mark in (None, "thorns"))
            dataset.add(pair, chosen, rejected)
        weights = load_file(ensure_toy_checkpoint())
        weights = {key: value for key, value in weights.items() if not key.startswith(_UNET)}
        shapes = {_UNET + key: shape for key, shape in small_checkpoints.unet_shapes().items()}
        weights |= small_checkpoints.random_weights(shapes)
        return cls(
            small_checkpoints.write(folder / "small.safetensors", weights),
            find_comfyui() / "comfy" / "sd1_tokenizer",
            dataset,
        )

    def train(self, out: Path, *overrides: str, **options) -> TrainResult:
        """Train by the toy recipe with these overrides, on the CPU."""
        recipe = load_recipe("toy", [*FAST, *overrides])
        options = {"device": "cpu", "tokenizer_folder": self.tokenizer, **options}
        return train_expert(self.checkpoint, self.dataset, recipe, out, **options)

    def command(self, out: Path, *more: str) -> list[str]:
        """Return the command-line arguments of the same."""
        overrides = [word for override in FAST for word in ("--set", override)]
        files = ["--model", self.checkpoint, "--dataset", self.dataset.folder, "--tokenizer", self.tokenizer]
        return ["train", *map(str, files), "--out", str(out), "--recipe", "toy", *overrides, *more]
