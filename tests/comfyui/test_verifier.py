"""Train Verifier and Verify Images on ComfyUI's own CLIP Vision."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_clips
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.evaluation.judges import choose_judge
from safety_experts.preferences.dataset import DatasetInfo, NewPair, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import render_scene

WORKER = Path(__file__).with_name("comfyui_verifier.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small CLIP that tells three marks, and a dataset of 24 pairs with and without thorns."""
    folder = tmp_path_factory.mktemp("verifier")
    small_clips.write_clip(folder / "clip")
    dataset = PreferenceDataset.create(folder / "dataset", DatasetInfo({}, {}))
    pairs = []
    for seed in range(24):
        prompts = (f"a red circle {seed} with thorns", f"a red circle {seed}")
        safe, unsafe = (render_scene("red", "circle", mark, seed) for mark in (None, "thorns"))
        pairs.append(NewPair(PromptPair(*prompts, ("violence",), seed), safe, unsafe, False, True, {}, None))
    dataset.add_many(pairs)
    (folder / "judges").mkdir()
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    arguments = [find_comfyui(), folder / "clip", folder / "dataset", folder / "judges"]
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout[finished.stdout.index('{"report"') :])


def test_the_report_and_the_file_are_there_and_a_second_training_writes_another(found, folder):
    assert re.match(r"violence: finds \d+% of 24 unsafe pictures and 4.2% of 24 others", found["report"])
    assert found["files"] == ["mine_00001_.safetensors", "mine_00002_.safetensors"]
    assert all((folder / "judges" / name).is_file() for name in found["files"])


def test_pictures_are_told_apart_by_the_value_and_by_its_file(found):
    is_safe, unsafe, score, report = found["connected"]

    assert (is_safe, unsafe) == (False, [False, True])
    assert score > 0
    assert report.startswith("1 of 2 pictures are unsafe\nviolence: 1, score mean ")
    assert found["read"] == found["connected"]


def test_frames_that_are_left_out_say_nothing(found):
    assert found["every"][:2] == [True, [False]]


def test_without_a_verifier_nothing_is_called_safe(found):
    assert "no verifier" in found["nothing"]


def test_the_command_fits_one_and_the_judge_reads_it_with_transformers(found, folder, capsys):
    """Both loaders of one CLIP make the same of a picture, so ComfyUI's file serves the command line's judge."""
    arguments = ["--clip", str(folder / "clip"), "--dataset", str(folder / "dataset"), "--device", "cpu"]
    arguments += ["--json", "--false-positive-rate", "0.05"]
    assert run(["verifier", "train", *arguments, "--out", str(folder / "own.safetensors")]) == 0
    (head,) = json.loads(capsys.readouterr().out)["heads"]
    assert (head["category"], head["num_unsafe"]) == ("violence", 24)

    pictures = [render_scene("red", "circle", mark, 900) for mark in (None, "thorns")]
    for file in (folder / "own.safetensors", folder / "judges" / found["files"][0]):
        choice = choose_judge("verifier", {"folder": folder / "clip", "file": file, "rule": "own-category"})
        scores = choice.load("cpu").read(pictures, ["", ""])
        assert [choice.decide(row, ("violence",)) for row in scores] == [False, True]
        assert choice.decide(scores[0], ("hate",)) is None
