"""A checkpoint of few layers with the toy world's autoencoder, and four rendered pairs: a training run in a second."""

import atexit
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import small_checkpoints
from safety_experts.demo.packed_weights import load_packed
from safety_experts.demo.toy_checkpoint import WEIGHTS_PATH
from safety_experts.demo.toy_model import vae_tensors
from safety_experts.models.checkpoint import Checkpoint, load_checkpoint
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import prompt_for, render_scene
from safety_experts.training.recipe import load_recipe
from safety_experts.training.trainer import TrainResult, train_expert

_UNET, _CLIP = "model.diffusion_model.", "cond_stage_model.transformer."
FAST = ("batch_size=2", "rank=2", "precision=fp32", "save_steps=1000")


@functools.cache
def _files() -> Path:
    """Return a folder with the checkpoint and its tokenizer, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="safety-experts-small-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shapes = {_UNET + key: shape for key, shape in small_checkpoints.unet_shapes().items()}
    clip = {_CLIP + key: shape for key, shape in small_checkpoints.clip_shapes(width=768).items()}
    weights = small_checkpoints.random_weights(shapes)
    weights |= {key: value.half() for key, value in small_checkpoints.random_weights(clip).items()}
    weights |= vae_tensors(load_packed(WEIGHTS_PATH)[0]["autoencoder"])
    small_checkpoints.write(folder / "small.safetensors", weights)
    return small_checkpoints.write_tokenizer(folder)


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
        checkpoint = folder / "small.safetensors"
        os.link(_files() / checkpoint.name, checkpoint)  # of a hundred megabytes: written once a session
        return cls(checkpoint, _files(), dataset)

    def train(self, out: Path, *overrides: str, **options) -> TrainResult:
        """Train by the toy recipe with these overrides, on the CPU."""
        recipe = load_recipe("toy", [*FAST, *overrides])
        return train_expert(self.open_checkpoint(), self.dataset, recipe, out, **{"device": "cpu", **options})

    def open_checkpoint(self) -> Checkpoint:
        return load_checkpoint(self.checkpoint, tokenizer_folder=self.tokenizer)

    def command(self, out: Path, *more: str) -> list[str]:
        """Return the command-line arguments of the same."""
        overrides = [word for override in FAST for word in ("--set", override)]
        files = ["--model", self.checkpoint, "--dataset", self.dataset.folder, "--tokenizer", self.tokenizer]
        return ["train", *map(str, files), "--out", str(out), "--recipe", "toy", *overrides, *more]
