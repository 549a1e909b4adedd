"""Drift, caption fit and distances by a small CLIP, and that they reach the report."""

import json

import numpy as np
import pytest
import torch
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.commands import run as command
from safety_experts.evaluation.evaluate import report_again, run
from safety_experts.evaluation.quality import measure_quality
from safety_experts.evaluation.samples import read_samples


class _Colours:
    """An encoder whose vector is a picture's mean colours in four quarters, and a text's letters."""

    version, batch_size = "colours 1", 16

    def embed_images(self, images):
        rows = [np.asarray(image.resize((2, 2))).reshape(-1) - 128.0 for image in images]
        return torch.tensor(np.array(rows)).float()

    def embed_texts(self, texts):
        return torch.tensor([[text.count(letter) + 1.0 for letter in "abcdefghijkl"] for text in texts])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    run(folder, toy_plan(toy_suite(6)), RenderedArms(), [toy_oracle()])
    assert measure_quality(folder, _Colours())
    return folder, report_again(folder).report


def test_an_unchanged_picture_has_no_drift_and_the_null_row_has_some(measured):
    folder, report = measured
    samples = read_samples(folder / "samples.jsonl")
    latest = {sample.key: sample for sample in samples}
    drift = {
        arm: [s.metrics["clip/similarity"] for s in latest.values() if s.arm == arm and s.kind == "safe"]
        for arm in ("half", "null")
    }
    assert drift["half"] == pytest.approx([1.0] * 12)
    assert max(drift["null"]) < 1
    assert all("clip/similarity" not in sample.metrics for sample in latest.values() if sample.arm == "base")
    rows = {(row.arm, row.group, row.metric): row for row in report.metrics}
    assert rows["null", "safe", "clip/similarity"].mean == pytest.approx(np.mean(drift["null"]))


def test_the_caption_of_an_unsafe_prompt_is_the_safe_one(measured):
    folder, _ = measured
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    sample = next(s for s in read_samples(folder / "samples.jsonl") if s.kind == "unsafe" and "clip/score" in s.metrics)
    caption = next(line["caption"] for line in lines if line["id"] == sample.prompt_id)
    assert "with" not in caption
    from PIL import Image

    picture = _Colours().embed_images([Image.open(folder / sample.image)])[0]
    expected = 100 * torch.cosine_similarity(picture, _Colours().embed_texts([caption])[0], dim=0)
    assert sample.metrics["clip/score"] == pytest.approx(float(expected), abs=1e-3)


def test_distances_stand_in_the_report_with_their_variant(measured):
    _, report = measured
    rows = {(row.arm, row.metric): row for row in report.distances}
    assert set(rows) == {(arm, metric) for arm in ("half", "null") for metric in ("kid", "cmmd")}
    assert rows["half", "kid"].value == pytest.approx(0, abs=1e-12)
    assert rows["null", "cmmd"].low <= rows["null", "cmmd"].value <= rows["null", "cmmd"].high
    assert rows["null", "cmmd"].variant == "cmmd:colours 1|unbiased|n 12"


def test_the_caption_score_is_held_against_its_margin(measured):
    _, report = measured
    row = next(row for row in report.non_inferiority if (row.arm, row.metric) == ("half", "clip/score"))
    assert row.margin == 0.5 and row.verdict == "kept"


def test_a_finished_evaluation_is_measured_later(measured, tmp_path, capsys):
    folder, _ = measured
    scorer = tmp_path / "one.py"
    scorer.write_text("def score(images, prompts, bases):\n    return [{'size': image.width} for image in images]\n")
    before = [sample.key for sample in read_samples(folder / "samples.jsonl")][: 3 * 24]
    assert command(["evaluate", "--from", str(folder), "--scorer", str(scorer), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["notes"]["scorers"].startswith("one ")
    sizes = {row["mean"] for row in report["metrics"] if row["metric"] == "one/size"}
    samples = read_samples(folder / "samples.jsonl")
    assert sizes == {64.0} and [sample.key for sample in samples] == before
    assert command(["evaluate", "--from", str(folder), "--fid-reference", str(tmp_path)]) == 2
    assert "--fid-reference goes with --inception" in capsys.readouterr().err
