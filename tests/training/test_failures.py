"""Whatever goes wrong in the middle of a training: one line says what, and what there was is kept."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safety_experts.commands import run as run_command
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.experts.expert_file import load_expert
from safety_experts.files import only_writer
from safety_experts.tensor_file import read_tensors, write_tensors
from safety_experts.training import trainer
from safety_experts.training.events import TrainingEvents
from safety_experts.training.trainer import resume_path
from small_training import SmallTraining

COMMAND_LINE = Path(__file__).resolve().parents[2] / "cli.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


class FailingDenoiser:
    """Fails in a forward pass with gradient of step `step`, as a full device or an overflow does."""

    def __init__(self, denoiser, step: int, how: str):
        self.denoiser, self.left, self.how = denoiser, step, how

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def predict(self, *inputs):
        predicted = self.denoiser.predict(*inputs)
        self.left -= torch.is_grad_enabled()
        if self.left > 0 or not torch.is_grad_enabled():
            return predicted
        if self.how == "nan":
            return predicted * math.nan
        if self.how == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.empty(1 << 60)  # what a CPU does not have


@pytest.fixture
def fail_at(monkeypatch):
    """Let the forward pass of a step fail."""

    load_policy = trainer.load_policy

    def fail_at(step: int, how: str) -> None:
        def load(*arguments):
            policy = load_policy(*arguments)
            policy.denoiser = FailingDenoiser(policy.denoiser, step, how)
            return policy

        monkeypatch.setattr(trainer, "load_policy", load)

    return fail_at


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cuda", r"out of memory at step 4 of 6; halve batch_size and double accumulation_steps, .* low-vram recipe"),
        ("cpu", r"out of memory at step 4 of 6; halve batch_size"),
        ("nan", r"the loss became nan at step 4 of 6; lower learning_rate"),
    ],
)
def test_a_failed_step_keeps_the_state_of_the_step_before(small, fail_at, monkeypatch, tmp_path, how, message):
    out = tmp_path / "a.safetensors"
    fail_at(4, how)
    with pytest.raises(SafetyExpertsError, match=message) as caught:
        small.train(out, "steps=6")
    assert "the state of step 3 is kept in a.resume" in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.resume"]

    monkeypatch.undo()
    small.train(out, "steps=6", resume=True)
    small.train(tmp_path / "straight" / "a.safetensors", "steps=6")
    assert out.read_bytes() == (tmp_path / "straight" / "a.safetensors").read_bytes()


def test_after_a_failure_the_remedy_may_be_followed_and_the_expert_says_so(small, fail_at, monkeypatch, tmp_path):
    out = tmp_path / "a.safetensors"
    fail_at(4, "cuda")
    with pytest.raises(SafetyExpertsError, match="out of memory"):
        small.train(out, "steps=6")
    monkeypatch.undo()
    remedy = ("batch_size=1", "accumulation_steps=2", "gradient_checkpointing=true")
    with pytest.raises(InputError, match=r"cannot resume from .*a.resume: its rank was 2, now it is 3"):
        small.train(out, "steps=6", *remedy, "rank=3", resume=True)
    result = small.train(out, "steps=6", *remedy, resume=True)
    assert len(result.records) == 6
    (change,) = load_expert(out).info.trained.resumed_with
    assert change == {
        "step": 3,
        "recipe": {"batch_size": 1, "accumulation_steps": 2, "gradient_checkpointing": True},
    }


def test_a_failure_in_the_first_step_or_in_encoding_leaves_nothing(small, fail_at, monkeypatch, tmp_path):
    fail_at(1, "cuda")
    with pytest.raises(SafetyExpertsError, match=r"out of memory at step 1 of 6; .*; nothing was trained yet"):
        small.train(tmp_path / "a.safetensors", "steps=6")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "load_policy", full)
    with pytest.raises(SafetyExpertsError, match=r"^out of memory: halve batch_size"):
        small.train(tmp_path / "a.safetensors", "steps=6")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_loss_saves_the_best_expert_there_was(small, fail_at, tmp_path):
    out = tmp_path / "a.safetensors"
    watched = ("held_out_fraction=0.5", "evaluate_steps=1", "patience=9", "steps=8", "sft_weight=0", "anchor_weight=0")
    seen = []
    fail_at(6, "nan")
    with pytest.raises(SafetyExpertsError, match="the expert of step") as caught:
        small.train(out, *watched, events=TrainingEvents(on_step=seen.append))
    losses = [record.metrics["eval/loss"] for record in seen if record.metrics]
    assert len(losses) == 5 and min(losses) < math.log(2)
    best = load_expert(out)
    assert best.info.trained.step == 1 + losses.index(min(losses))
    assert f"the expert of step {best.info.trained.step} was saved as a.safetensors" in str(caught.value)


def test_a_bad_loss_saves_the_averaged_expert(small, fail_at, tmp_path):
    fail_at(3, "nan")
    with pytest.raises(SafetyExpertsError, match=r"the expert of step 2 was saved as a\.safetensors"):
        small.train(tmp_path / "a.safetensors", "steps=6", "ema_decay=0.5")
    assert load_expert(tmp_path / "a.safetensors").info.trained.step == 2


@pytest.mark.parametrize(("full_at", "refused"), [(3, "a.resume"), (5, "a.safetensors")])
def test_a_full_disk_is_one_line_and_the_state_before_goes_on(small, limit_files, tmp_path, full_at, refused):
    out = tmp_path / "a.safetensors"
    straight = small.train(tmp_path / "straight" / "a.safetensors", "steps=6", "save_steps=2").path.read_bytes()

    def fill_the_disk(record):
        if record.metrics and record.step == full_at:
            limit_files(1000)

    with pytest.raises(SafetyExpertsError, match=rf"cannot write .*{refused}: File too large") as caught:
        small.train(out, "steps=6", "save_steps=2", events=TrainingEvents(on_step=fill_the_disk))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.resume", "straight"]
    limit_files(resource.RLIM_INFINITY)
    small.train(out, "steps=6", "save_steps=2", resume=True)
    assert out.read_bytes() == straight


@pytest.mark.parametrize("damage", ["cut", "other file", "other content", "missing weight"])
def test_a_damaged_state_is_one_line(small, tmp_path, damage):
    out = tmp_path / "a.safetensors"
    seen = []
    events = TrainingEvents(on_step=seen.append, should_stop=lambda: len([r for r in seen if r.metrics]) >= 2)
    small.train(out, "steps=6", events=events)
    state = resume_path(out)
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "other file":
        state.write_bytes(out.read_bytes())
    else:
        tensors, metadata = read_tensors(state)
        if damage == "missing weight":
            tensors.popitem()
            del tensors[next(name for name in tensors if name.startswith("best."))]
        else:
            metadata["progress"] = metadata["progress"][:-5]
        write_tensors(state, tensors, metadata)
    with pytest.raises(InputError, match=r"cannot resume from .*a.resume: ") as caught:
        small.train(out, "steps=6", resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on_to_the_same_file(small, tmp_path):
    out, overrides = tmp_path / "a.safetensors", ("--set", "steps=60", "--device", "cpu", "--json-lines")
    straight = small.train(tmp_path / "straight" / "a.safetensors", "steps=60").path.read_bytes()
    command = [sys.executable, str(COMMAND_LINE), *small.command(out, *overrides)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1]["stage"] == "train" and lines[-1]["step"] == 2:
                process.send_signal(signal.SIGINT)
        errors = process.stderr.read()

    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: stopped after ") and "--resume goes on" in errors
    assert lines[-1]["stage"] == "done" and lines[-1]["stopped"] and 2 <= len(lines[-1]["records"]) < 60
    assert load_expert(out).info.trained.step == len(lines[-1]["records"]) and resume_path(out).exists()
    assert run_command([*small.command(out, *overrides), "--resume"]) == 0
    assert out.read_bytes() == straight


def test_two_trainings_into_one_file_are_refused(small, tmp_path):
    out = tmp_path / "a.safetensors"
    with only_writer(out), pytest.raises(InputError, match=r"another process is working on .*a\.safetensors; wait"):
        small.train(out, "steps=1")
    assert list(tmp_path.iterdir()) == []
