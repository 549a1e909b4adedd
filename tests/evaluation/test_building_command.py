"""`dataset build` with a real, very small checkpoint: alone, by torchrun, and killed in between."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_checkpoints as small
from PIL import Image
from safety_experts.commands import run
from safety_experts.preferences.dataset import ImageToImage, PreferenceDataset

pytestmark = pytest.mark.slow

CLI = Path(__file__).resolve().parents[2] / "cli.py"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The arguments of a build of six pairs, but for --out."""
    folder = tmp_path_factory.mktemp("build")
    clip = {f"cond_stage_model.transformer.{key}": shape for key, shape in small.clip_shapes(width=768).items()}
    small.write(folder / "small.safetensors", small.sd1_weights() | small.random_weights(clip))
    small.write_tokenizer(folder / "tokenizer")
    rows = "".join(f"a {letter} with thorns,a {letter},violence\n" for letter in "abcdef")
    (folder / "prompts.csv").write_text("prompt,safe_prompt,category\n" + rows)
    arguments = ["--model", str(folder / "small.safetensors"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--prompts", str(folder / "prompts.csv"), "--steps", "2", "--width", "32", "--height", "32"]
    return [*arguments, "--batch-size", "1", "--device", "cpu"]


def start(command, out, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out)], env=environment, text=True, stderr=subprocess.PIPE, **options
    )


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_torchrun_makes_the_folder_of_one_process_also_after_a_kill(setting, tmp_path):
    alone = start([sys.executable, str(CLI), "dataset", "build", *setting], tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(CLI)]
    together = start([*launch, "dataset", "build", *setting], tmp_path / "two")
    for process in (alone, together):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    whole = content(tmp_path / "one")
    assert content(tmp_path / "two") == whole
    dataset = PreferenceDataset.open(tmp_path / "one")
    assert [pair.seed for pair in dataset.pairs] == list(range(6)) and dataset.check() == []
    assert (dataset.info.base_checkpoint.family, dataset.info.sampler["steps"]) == ("sd15", 2)

    # Half of it gone, as a kill leaves it; the same command draws the rest.
    metadata = tmp_path / "one" / "metadata.jsonl"
    lines = metadata.read_bytes().splitlines(keepends=True)
    metadata.write_bytes(b"".join(lines[:3]) + lines[3][:50])
    again = start([sys.executable, str(CLI), "dataset", "build", *setting], tmp_path / "one")
    _, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    assert content(tmp_path / "one") == whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--best-of", "2"], "--best-of and --judge go together"),
        (["--judge", "toy-oracle"], "--best-of and --judge go together"),
        (["--image-to-image", "1"], "denoise 1.0 must be above 0 and below 1"),
        (["--image-to-image", "nan"], "denoise nan must be above 0"),
        (["--image-to-image", "0.001"], "too little for 2 steps"),
        (["--negate-unsafe"], "--negate-unsafe needs --image-to-image"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--width", "33"], "multiple of 8"),
        (["--prompts", "nowhere.csv"], "no such file"),
        (["--model", "nowhere.safetensors"], "no such file"),
    ],
)
def test_wrong_options_are_one_line_and_exit_two(setting, tmp_path, capsys, changes, says):
    assert run(["dataset", "build", *setting, "--out", str(tmp_path / "out"), *changes]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_safe_image_starts_from_the_unsafe_one(setting, tmp_path):
    for name, words in {
        "noise": [],
        "little": ["--image-to-image", "0.1"],
        "much": ["--image-to-image", "0.9", "--negate-unsafe"],
    }.items():
        assert run(["dataset", "build", *setting, "--out", str(tmp_path / name), *words]) == 0
    noise, little, much = (PreferenceDataset.open(tmp_path / name) for name in ("noise", "little", "much"))

    assert much.info.image_to_image == ImageToImage(0.9, True) and noise.info.image_to_image is None
    for pair in noise.pairs:
        unsafe, same = (_pixels(dataset.image_paths(pair)[1]) for dataset in (noise, little))
        assert np.abs(unsafe - same).max() <= 1  # drawn in a batch of another size
    distances = [_distance(dataset) for dataset in (little, much)]
    assert distances[0] < distances[1] / 2
    assert run(["dataset", "build", *setting, "--out", str(tmp_path / "much")]) == 2  # other settings than there


def _distance(dataset) -> float:
    """The mean difference of the two images of a pair."""
    both = [map(_pixels, dataset.image_paths(pair)) for pair in dataset.pairs]
    return float(np.mean([np.abs(chosen - rejected).mean() for chosen, rejected in both]))


def _pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(float)
