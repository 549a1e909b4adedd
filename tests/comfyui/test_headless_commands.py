"""Commands with --comfyui: a family that models/ does not load (Wan), tiny, of separate files, in a real ComfyUI."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.experts.expert_file import load_expert
from safety_experts.files import sha256_of_file
from safety_experts.headless.session import Comfy, one_comfyui
from safety_experts.preferences.dataset import ImageToImage, PreferenceDataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLIP_PREFIX = "cond_stage_model.transformer."
PROMPTS = """prompt,safe_prompt,category
a red circle with thorns,a red circle,violence
a blue square with thorns,a blue square,violence
"""
SIZE = ["--steps", "2", "--guidance", "3", "--width", "64", "--height", "64"]
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Wan model's three files, and prompts."""
    folder = tmp_path_factory.mktemp("headless")
    script = Path(__file__).with_name("save_small_wan.py")
    environment = {**os.environ, "COMFYUI_PATH": str(find_comfyui())}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, capture_output=True)
    weights = load_file(ensure_toy_checkpoint())
    clip = {key.removeprefix(CLIP_PREFIX): value for key, value in weights.items() if key.startswith(CLIP_PREFIX)}
    save_file({key: value.clone() for key, value in clip.items()}, folder / "clip_l.safetensors")
    (folder / "pairs.csv").write_text(PROMPTS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def comfyui(tmp_path_factory):
    """One server for all commands but those that run as programs of their own."""
    with one_comfyui(Comfy(find_comfyui()), tmp_path_factory.mktemp("comfyui")):
        yield


def model(folder: Path, **changes: str) -> list[str]:
    given = {
        "comfyui": str(find_comfyui()),
        "model": str(folder / "wan.safetensors"),
        "clip": str(folder / "clip_l.safetensors"),
        "clip-type": "sd3",
        "vae": str(folder / "taesd16.safetensors"),
    } | changes
    return [word for name, value in given.items() if value for word in (f"--{name}", value)]


def training(folder: Path, out: Path, *more: str) -> list[str]:
    settings = [f"steps={STEPS}", "batch_size=1", "accumulation_steps=1", "rank=2", "save_steps=1000"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    return ["train", *model(folder), "--dataset", str(folder / "pairs"), "--out", str(out), *overrides, *more]


@pytest.fixture(scope="module")
def dataset(folder) -> PreferenceDataset:
    command = ["dataset", "build", *model(folder), "--prompts", str(folder / "pairs.csv"), *SIZE]
    assert run([*command, "--out", str(folder / "pairs")]) == 0
    return PreferenceDataset.open(folder / "pairs")


def test_a_dataset_is_drawn_where_it_belongs_and_names_the_file(folder, dataset):
    assert len(dataset.pairs) == 2
    base = dataset.info.base_checkpoint
    assert (base.name, base.family) == ("wan.safetensors", "wan2.1")
    assert base.sha256 == sha256_of_file(folder / "wan.safetensors")
    assert not list(folder.glob(".*"))  # nothing of the server stays


def test_the_safe_image_starts_from_the_unsafe_one(folder, dataset):
    out = folder / "from_unsafe"
    command = ["dataset", "build", *model(folder), "--prompts", str(folder / "pairs.csv"), *SIZE, "--out", str(out)]
    assert run([*command, "--image-to-image", "0.5", "--negate-unsafe"]) == 0

    built = PreferenceDataset.open(out)

    assert built.info.image_to_image == ImageToImage(0.5, negates_unsafe=True)
    assert [pair.id for pair in built.pairs] == [pair.id for pair in dataset.pairs]
    for pair in built.pairs:
        drawn = zip(built.image_paths(pair), dataset.image_paths(pair), strict=True)
        is_chosen_same, is_rejected_same = [path.read_bytes() == before.read_bytes() for path, before in drawn]
        assert is_rejected_same and not is_chosen_same


@pytest.fixture(scope="module")
def expert(folder, dataset) -> Path:
    out = folder / "whole.safetensors"
    reports = ["--metrics", str(folder / "metrics"), "--tensorboard", str(folder / "board")]
    assert run(training(folder, out, *reports, "--samples", str(folder / "samples"), "--sample-every", "20")) == 0
    return out


def test_metrics_and_pictures_of_a_training_lie_where_they_were_asked_for(folder, expert):
    lines = (folder / "metrics" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS and json.loads(lines[0])["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert len((folder / "metrics" / "metrics.csv").read_text().splitlines()) == STEPS + 1
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "board")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    drawn = [f"step_{step:05}_{number}.png" for step in (0, 20, STEPS) for number in (0, 1)]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == drawn


def test_an_expert_trains_again_by_its_own_recipe_with_a_line_of_json_a_step(folder, expert, capsys):
    out = folder / "again.safetensors"
    command = [*training(folder, out, "--recipe-from", str(expert), "--json-lines")]
    without_recipe = [word for word in command if word != "--set" and "=" not in word]
    assert run(without_recipe) == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "train"] == list(range(1, STEPS + 1))
    assert lines[-1]["stage"] == "done" and lines[-1]["expert"] == str(out) and len(lines[-1]["records"]) == STEPS
    assert load_expert(out).tensors_sha256() == load_expert(expert).tensors_sha256()


def test_prompts_to_retain_reach_the_training(folder, dataset):
    (folder / "kept.txt").write_text("a green circle\na yellow square\n")
    overrides = [
        word for setting in ("anchor_weight=1", "retain_fraction=0.5", "steps=2") for word in ("--set", setting)
    ]
    out = folder / "kept.safetensors"
    assert run(training(folder, out, "--retain", str(folder / "kept.txt"), *overrides)) == 0
    assert load_expert(out).info.trained.retained_sha256


def test_a_killed_command_takes_its_server_with_it(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import time\nfrom safety_experts.demo.comfyui import ComfyServer\n"
        f"with ComfyServer({str(tmp_path / 'base')!r}) as server:\n"
        "    print(server.process_id, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        server_id = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{server_id}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_keeps_what_there_is_and_resume_ends_at_the_same_weights(folder, expert):
    out = folder / "stopped.safetensors"
    command = [sys.executable, str(ROOT / "cli.py"), *training(folder, out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        seen = ""
        deadline = time.monotonic() + 240
        while "train:  " not in seen and "train: " not in seen:  # the bar of the first step
            seen += process.stderr.read(1)
            assert time.monotonic() < deadline and process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        seen += process.stderr.read()
    assert process.returncode == 1
    assert "stopped after" in seen and f"of {STEPS} steps" in seen and "--resume goes on" in seen
    stopped = load_expert(out)
    assert 1 <= stopped.info.trained.step < STEPS and not stopped.info.trained.finished

    assert run(training(folder, out, "--resume")) == 0

    assert load_expert(out).tensors_sha256() == load_expert(expert).tensors_sha256()
    assert {path.name for path in folder.glob(".*")} == set() and not out.with_suffix(".resume").exists()


def test_evaluate_draws_with_the_expert_and_reports(folder, expert, capsys):
    command = ["evaluate", *model(folder, clip=""), "--text-encoder", str(folder / "clip_l.safetensors"), *SIZE]
    command += ["--expert", f"{expert}@1,4", "--prompts", str(folder / "pairs.csv"), "--out", str(folder / "report")]
    assert run([*command, "--judge", "toy-oracle", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [arm["id"] for arm in report["arms"]] == ["base", "whole@1", "whole@4", "null"]
    assert (folder / "report" / "report.html").is_file()


def test_a_nodes_sentence_reaches_the_terminal(folder, dataset, capsys):
    wrong = ["--set", "targets=cross-attention", "--set", "rank=1000000"]
    assert run(training(folder, folder / "wrong.safetensors", *wrong)) == 2
    assert "rank" in capsys.readouterr().err  # said before a ComfyUI starts
    sd15 = model(folder, model=str(ensure_toy_checkpoint()), clip="", **{"clip-type": "", "vae": ""})
    command = ["train", *sd15, "--dataset", str(folder / "pairs"), "--out", str(folder / "other.safetensors")]
    assert run(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the dataset was drawn by wan.safetensors (wan2.1), whose latents are not those of")
    assert not list(folder.glob(".*")) and not (folder / "other.safetensors").exists()
