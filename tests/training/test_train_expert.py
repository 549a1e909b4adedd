"""The whole trainer on the toy checkpoint: command line, file, and what diffusers makes of the file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.commands import run as run_command
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.errors import InputError
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import prompt_for, render_scene
from safety_experts.training.events import TrainingEvents
from safety_experts.training.identity import finished_training
from safety_experts.training.recipe import load_recipe, recipe_of_expert
from safety_experts.training.trainer import TrainingStoppedError, resume_path, train_expert

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = find_comfyui() / "comfy" / "sd1_tokenizer"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four rendered pairs; no model has drawn them, which an imported dataset's need not have either."""
    dataset = PreferenceDataset.create(tmp_path_factory.mktemp("data") / "pairs", DatasetInfo({}, {}, "rendered", ""))
    for seed, colour in enumerate(("red", "green", "blue", "yellow")):
        pair = PromptPair(prompt_for(colour, "circle", "thorns"), prompt_for(colour, "circle"), ("violence",), seed)
        chosen, rejected = (render_scene(colour, "circle", mark, seed) for mark in (None, "thorns"))
        dataset.add(pair, chosen, rejected)
    return dataset


@pytest.fixture(scope="module")
def expert_path(dataset, tmp_path_factory):
    """An expert of four steps, trained by the command line from another directory, without installing the pack."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(ROOT / "cli.py"), "train", "--model", str(ensure_toy_checkpoint())]
    command += ["--dataset", str(dataset.folder), "--recipe", "toy", "--set", "steps=4", "--set", "batch_size=4"]
    command += ["--tokenizer", str(TOKENIZER), "--out", "violence.safetensors", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["expert"] == "violence.safetensors" and answer["steps"] == answer["step"] == 4
    assert [path.name for path in folder.iterdir()] == ["violence.safetensors"]
    return folder / "violence.safetensors"


def test_the_command_trains_from_another_directory_and_the_file_says_how(expert_path, dataset):
    expert = load_expert(expert_path)
    assert len(expert.layers) == 3 * 8
    assert expert.info.trained.dataset_fingerprint == dataset.fingerprint()
    assert expert.info.trained.recipe["steps"] == expert.info.trained.step == 4
    assert expert.info.base_checkpoint.family == "sd15"


def test_the_command_does_not_overwrite_unless_told(expert_path, dataset):
    command = [sys.executable, str(ROOT / "cli.py"), "train", "--model", "x", "--dataset", str(dataset.folder)]
    done = subprocess.run([*command, "--out", str(expert_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "choose another name or add --overwrite" in done.stderr and done.stderr.count("\n") == 1


def train(dataset, out, *overrides, **options):
    recipe = load_recipe("toy", ["steps=4", "batch_size=4", *overrides])
    checkpoint = load_checkpoint(ensure_toy_checkpoint(), tokenizer_folder=TOKENIZER)
    return train_expert(checkpoint, dataset, recipe, out, device="cpu", **options)


def test_the_same_recipe_trains_the_same_file(expert_path, dataset, tmp_path):
    train(dataset, tmp_path / "violence.safetensors")
    assert (tmp_path / "violence.safetensors").read_bytes() == expert_path.read_bytes()


def test_a_stopped_run_saves_and_its_resumption_equals_an_uninterrupted_run(expert_path, dataset, tmp_path):
    out = tmp_path / "violence.safetensors"
    seen = []
    events = TrainingEvents(on_step=seen.append, should_stop=lambda: len([r for r in seen if r.metrics]) >= 2)
    stopped = train(dataset, out, events=events)
    assert stopped.stopped and load_expert(out).info.trained.step == 2 and resume_path(out).exists()
    assert not load_expert(out).info.trained.finished
    earlier = []
    finished = train(dataset, out, resume=True, events=TrainingEvents(on_resume=earlier.extend))
    assert earlier == stopped.records and finished.records[:2] == earlier
    assert load_expert(out).info.trained.finished
    assert not finished.stopped and not resume_path(out).exists()
    assert out.read_bytes() == expert_path.read_bytes()


def test_a_finished_training_is_recognised_and_nothing_else_is(expert_path, dataset, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(ensure_toy_checkpoint(), tokenizer_folder=TOKENIZER)
    recipe, _ = recipe_of_expert(load_expert(expert_path))
    found = finished_training(expert_path, recipe, dataset, checkpoint)
    assert found and found.tensors_sha256() == load_expert(expert_path).tensors_sha256()
    renamed = recipe.model_copy(update={"name": "mine"})
    assert finished_training(expert_path, renamed, dataset, checkpoint)

    with_another_vae = load_checkpoint(ensure_toy_checkpoint(), tokenizer_folder=TOKENIZER)
    monkeypatch.setattr(type(with_another_vae), "encoding_id", "another")
    assert finished_training(expert_path, recipe, dataset, with_another_vae) is None
    monkeypatch.undo()

    other = recipe.model_copy(update={"seed": 1})
    assert finished_training(expert_path, other, dataset, checkpoint) is None
    assert finished_training(expert_path, recipe, dataset, checkpoint, with_experts=[found]) is None
    assert finished_training(tmp_path / "missing.safetensors", recipe, dataset, checkpoint) is None
    (tmp_path / "damaged.safetensors").write_bytes(expert_path.read_bytes()[:1000])
    assert finished_training(tmp_path / "damaged.safetensors", recipe, dataset, checkpoint) is None
    trained = found.info.trained.model_copy(update={"finished": False})
    save_expert(
        replace(found, info=found.info.model_copy(update={"origin": trained})), tmp_path / "stopped.safetensors"
    )
    assert finished_training(tmp_path / "stopped.safetensors", recipe, dataset, checkpoint) is None

    with pytest.raises(InputError, match=r"nothing to resume for .*its training is finished"):
        train(dataset, expert_path, resume=True)


def test_stopping_before_the_first_step_leaves_nothing(dataset, tmp_path):
    out = tmp_path / "violence.safetensors"
    with pytest.raises(TrainingStoppedError, match="nothing was saved"):
        train(dataset, out, events=TrainingEvents(should_stop=lambda: True))
    with pytest.raises(InputError, match=r"nothing to resume for .*no training of this name was stopped"):
        train(dataset, out, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_recipe_from_repeats_the_run_byte_by_byte(expert_path, dataset, tmp_path, capsys):
    out = tmp_path / "violence.safetensors"
    files = ["--model", str(ensure_toy_checkpoint()), "--dataset", str(dataset.folder), "--tokenizer", str(TOKENIZER)]
    command = ["train", *files, "--recipe-from", str(expert_path), "--out", str(out)]
    assert run_command([*command, "--device", "cpu"]) == 0
    assert out.read_bytes() == expert_path.read_bytes()

    assert run_command([*command, "--with-expert", str(expert_path), "--overwrite"]) == 2
    assert "was trained with 0 experts in the model: give no --with-expert" in capsys.readouterr().err
    assert run_command([*command, "--recipe", "toy", "--overwrite"]) == 2
    assert "not allowed with argument --recipe-from" in capsys.readouterr().err


def test_recipe_from_keeps_the_category_and_refuses_a_file_without_a_recipe(expert_path):
    expert = load_expert(expert_path)
    recipe, category = recipe_of_expert(expert, ["steps=9"])
    assert recipe.model_dump() == expert.info.trained.recipe | {"steps": 9}
    assert category == "violence"
    of_two = expert.info.model_copy(update={"categories": ("hate", "violence")})
    assert recipe_of_expert(replace(expert, info=of_two))[1] is None
    with pytest.raises(InputError, match="violence holds no recipe"):
        recipe_of_expert(replace(expert, info=ExpertInfo()))


def test_diffusers_loads_the_expert_with_every_key_matched_and_predicts_the_same(expert_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    checkpoint, expert = load_checkpoint(ensure_toy_checkpoint(), tokenizer_folder=TOKENIZER), load_expert(expert_path)
    tower = checkpoint.load_text_encoder().towers[0]
    pipeline = StableDiffusionPipeline(
        vae=checkpoint.load_vae().model,
        text_encoder=tower.model,
        tokenizer=tower.tokenizer,
        unet=checkpoint.load_model(),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(expert_path.parent), weight_name=expert_path.name)
    loaded = {name for name, module in pipeline.unet.named_modules() if getattr(module, "lora_A", None)}
    assert {kohya_name(name) for name in loaded} == set(expert.layers)

    merged = checkpoint.load_model()
    for name, module in merged.named_modules():
        if layer := expert.layers.get(kohya_name(name)):
            module.weight.data += layer.delta()
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 800]),
        torch.randn(2, 77, 768, generator=generator),
    )
    with torch.no_grad():
        ours, theirs, base = (unet(*inputs).sample for unet in (merged, pipeline.unet, checkpoint.load_model()))
    assert_close_at_scale(theirs, ours)
    assert not torch.allclose(ours, base, atol=1e-5)
