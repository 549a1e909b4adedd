"""Soft-prompt experts: vectors behind every prompt, trained as an expert and saved as an embedding."""

import json

import pytest
import torch
from safetensors.torch import load_file
from safety_experts.commands import run
from safety_experts.models.tokenizer import END_TOKEN
from safety_experts.training.recipe import load_recipe
from safety_experts.training.soft_prompt import SoftPromptTower, train_soft_prompt
from small_training import FAST, SmallTraining


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def tower(small):
    return SoftPromptTower(small.open_checkpoint().load_text_encoder().towers[0], 2, "a")


def test_vectors_stand_behind_the_words_of_any_prompt(tower):
    for prompt, end in (("", 3), ("a a", 5), ("a " * 90, 76)):
        row = tower.tokens([prompt])[0].tolist()
        assert row.index(END_TOKEN) == end and row[end - 2 : end] == [0, 0] and len(row) == 77


def test_they_begin_as_a_word(tower):
    """So the prompt with that word twice more is encoded alike."""
    with torch.no_grad():
        ours = tower.encode(tower.tokens(["a a", "a"]))[0]
        theirs = tower._tower.encode(["a a a a", "a a a"])[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_training_prefers_the_chosen_image_and_leaves_the_model_alone(small, tmp_path):
    recipe = load_recipe("toy", [*FAST, "steps=4", "learning_rate=0.05", "sft_weight=0", "anchor_weight=0"])
    records = train_soft_prompt(small.open_checkpoint(), small.dataset, recipe, tmp_path / "soft.safetensors")
    again = train_soft_prompt(small.open_checkpoint(), small.dataset, recipe, tmp_path / "again.safetensors")
    assert again == records
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "soft.safetensors").read_bytes()
    first, last = (sum(record["loss"] for record in part) for part in (records[:2], records[-2:]))
    assert last < first
    assert load_file(tmp_path / "soft.safetensors")["emb_params"].shape == (1, 768)


@pytest.mark.slow
def test_the_command_writes_an_embedding_and_says_how_to_use_it(small, tmp_path, capsys):
    out = tmp_path / "safer.safetensors"
    command = [*small.command(out, "--set", "steps=1", "--vectors", "2", "--device", "cpu")]
    command[0] = "soft-prompt"
    assert run(command) == 0
    assert "embedding:safer" in capsys.readouterr().out
    assert load_file(out)["emb_params"].shape == (2, 768)
    assert run([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert run([*command, "--overwrite", "--vectors", "99"]) == 2
    assert "give 1 to 32" in capsys.readouterr().err
