"""What an expert leaves of a contrast, and what a LoRA beside it opens again."""

import json

import pytest
from safety_experts.commands import run as run_command
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import save_expert
from safety_experts.training.residual import Residuals, measure_residuals
from small_training import SmallTraining


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    return small.train(tmp_path_factory.mktemp("out") / "e.safetensors", "steps=2", "learning_rate=0.05").expert


def scaled(expert, factor, name):
    layers = {key: LoraLayer(layer.down, layer.up * factor, layer.alpha) for key, layer in expert.layers.items()}
    return Expert(layers, expert.info, name)


def test_the_worked_example_is_flagged():
    found = Residuals(contrast=1.0, alone=0.02, stacked=0.09)
    assert found.stack_leak == pytest.approx(0.07) and found.to_json()["is_flagged"]
    assert Residuals(1.0, 0.5).to_json() == {
        "contrast": 1.0, "alone": 0.5, "stacked": None, "stack_leak": None, "is_flagged": False
    }  # fmt: skip


def test_an_expert_of_nothing_leaves_everything_and_a_lora_that_undoes_one_opens_all(small, trained):
    checkpoint, options = small.open_checkpoint(), {"num_draws": 8, "device": "cpu"}
    nothing = scaled(trained, 0.0, "nothing")
    assert measure_residuals(nothing, checkpoint, small.dataset, **options).alone == 1.0
    beside_nothing = measure_residuals(trained, checkpoint, small.dataset, others=[nothing], **options)
    assert beside_nothing.stack_leak == 0.0 and beside_nothing.alone != 1.0
    # A style that is the expert the other way round: with it the expert changes nothing of the base, the teacher all.
    undone = measure_residuals(trained, checkpoint, small.dataset, others=[scaled(trained, -1.0, "undo")], **options)
    assert undone.alone == beside_nothing.alone and undone.stacked != undone.alone


def test_the_command_prints_the_same_numbers(small, trained, tmp_path, capsys):
    save_expert(trained, tmp_path / "e.safetensors")
    arguments = ["residual", str(tmp_path / "e.safetensors"), "--model", str(small.checkpoint)]
    arguments += ["--dataset", str(small.dataset.folder), "--tokenizer", str(small.tokenizer), "--device", "cpu"]
    assert run_command([*arguments, "--draws", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = measure_residuals(trained, small.open_checkpoint(), small.dataset, num_draws=8, device="cpu")
    assert found["alone"] == pytest.approx(expected.alone, rel=1e-4)
    assert run_command([*arguments, "--draws", "0"]) == 2
