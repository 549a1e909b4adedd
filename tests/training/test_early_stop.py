"""Patience on the command line: what is saved is trained, and a run that never got better saves nothing and says so."""

import json

import pytest
from safety_experts.commands import run as run_command
from safety_experts.experts.expert_file import load_expert
from safety_experts.training.recipe import Recipe
from safety_experts.training.stop_rules import is_kept
from safety_experts.training.trainer import resume_path
from small_training import SmallTraining

WATCHED = ("held_out_fraction=0.25", "evaluate_steps=2", "patience=2", "anchor_weight=0", "warmup_steps=0")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


def run(small, out, *overrides) -> int:
    return run_command(small.command(out, "--json", *(word for text in overrides for word in ("--set", text))))


def test_hinge_starts_at_1_and_what_is_saved_is_trained(small, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert (
        run(small, out, *WATCHED, "objective=hinge", "sft_weight=0", "beta=20", "learning_rate=1e-2", "steps=12") == 0
    )
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    trained = load_expert(out).info.trained
    assert answer["step"] == trained.step > 0 and trained.finished
    assert trained.metrics["eval/untrained_loss"] == pytest.approx(1, abs=1e-5)
    assert 0.7 < trained.metrics["eval/loss"] < 1  # ln 2 would not have let it count
    assert any(layer.up.any() for layer in load_expert(out).layers.values())
    assert run_command(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "hinge" in shown and "toy" in shown and f"step: {trained.step}" in shown


def test_a_run_that_never_got_better_saves_no_expert_and_exits_with_1(small, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert run(small, out, *WATCHED, "learning_rate=1", "beta=100000", "steps=40") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was better than the untrained model's loss of 0.6931" in error and "no expert was saved" in error
    assert not out.exists() and not resume_path(out).exists()


def test_of_equal_measurements_the_later_is_kept_unless_they_equal_the_untrained_expert():
    recipe = Recipe(held_out_fraction=0.2, patience=3)
    saturated = {"eval/loss": 0.0, "eval/drift": 0.0, "eval/chosen_increase": 0.0}  # hinge, once margins pass 1
    assert is_kept(saturated, 0.0, recipe, best_step=5)
    assert not is_kept(saturated, 0.0, recipe, best_step=0)
    assert not is_kept({**saturated, "eval/loss": 0.1}, 0.0, recipe, best_step=5)
