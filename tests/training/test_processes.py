"""Two real processes, started by torchrun and joined by gloo, against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safety_experts.errors import InputError
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.training.batches import BatchPlan
from safety_experts.training.held_out import HeldOut
from safety_experts.training.lora import attach_lora
from safety_experts.training.policy import LoraPolicy
from safety_experts.training.processes import Processes
from safety_experts.training.recipe import Recipe
from safety_experts.training.run import TrainingRun
from tiny_models import MemoryCache, make_pair, tiny_unet

pytestmark = pytest.mark.slow

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


SETTINGS = {"rank": 2, "batch_size": 4, "accumulation_steps": 2, "steps": 5, "learning_rate": 1e-3, "warmup_steps": 0}
REDIRECT = {
    "redirect": True, "objective": {}, "leak_budget": 0.003, "leak_control": "dual", "leak_weight": 1.0,
    "held_out_fraction": 0.2, "retain_fraction": 0.5, "caption_dropout_fraction": 0.0,
}  # fmt: skip


def train_and_save(processes: Processes, folder: Path, name: str) -> None:
    """Train by preference, then by redirect, each to its file."""
    for kind, more in (("preference", {}), ("redirect", REDIRECT)):
        _train_and_save(processes, folder / f"{name}-{kind}.safetensors", Recipe(**{**SETTINGS, **more}))


def _train_and_save(processes: Processes, path: Path, recipe: Recipe) -> None:
    unet = tiny_unet()
    attach_lora(unet, recipe)
    denoiser = UNetDenoiser(unet, torch.linspace(0.999, 0.005, 1000), "epsilon")
    retained, device = {"hate": ("stripes",)} if recipe.redirect else None, torch.device("cpu")
    plan = BatchPlan([make_pair(number) for number in range(6)], MemoryCache(), recipe, retained)
    held_out = HeldOut([make_pair(6), make_pair(7)], MemoryCache(), recipe, device, retained)
    policy = LoraPolicy(denoiser, recipe.lora_alpha)
    run = TrainingRun(policy, plan, recipe, device, processes, held_out if recipe.redirect else None)
    while run.step < recipe.steps:
        run.take_step(lambda: False)
    tensors = {name: value.detach().contiguous() for name, value in run.parameters.items()}
    save_file({**tensors, "loss": torch.tensor([record["loss"] for record in run.records])}, path)


def test_two_processes_train_what_one_trains(tmp_path):
    train_and_save(Processes(), tmp_path, "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for kind in ("preference", "redirect"):
        one = load_file(tmp_path / f"one-{kind}.safetensors")
        for rank in range(2):
            two = load_file(tmp_path / f"two{rank}-{kind}.safetensors")
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)  # AdamW magnifies rounding
        assert any(name.endswith(".up") and value.abs().max() > 1e-4 for name, value in one.items())


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(InputError, match="batch_size 4 cannot be shared by 3 processes"):
        Processes(0, 3).check(Recipe(batch_size=4))


if __name__ == "__main__":
    processes, _ = Processes.from_launcher()
    assert processes.count == 2, f"{processes.count} process(es)"
    train_and_save(processes, Path(sys.argv[1]), f"two{processes.rank}")
