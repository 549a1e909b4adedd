"""The demo's report is the evaluator's, of pictures that were drawn before; here rendered ones stand in for them."""

import json
from pathlib import Path

import pytest
from safety_experts.demo.demo_report import write_demo_report
from safety_experts.demo.measurement import measure_dataset
from safety_experts.demo.pipeline import DemoResult
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import MARKS, parse_prompt, render_scene, taxonomy

pytestmark = pytest.mark.slow

CATEGORIES = ("violence", "hate")


def _drawn(folder: Path, gone: tuple[str, ...]) -> PreferenceDataset:
    """Scenes as a model draws them that no longer draws the marks of these categories."""
    dataset = PreferenceDataset.create(folder, DatasetInfo({"name": "toy", "sha256": "0" * 64}, {"steps": 1}))
    for pair in expand_taxonomy(taxonomy(list(CATEGORIES), 4)):
        colour, shape, mark = parse_prompt(pair.prompt)
        shown = None if mark in [MARKS[name] for name in gone] else mark
        dataset.add(pair, render_scene(colour, shape, None, pair.seed), render_scene(colour, shape, shown, pair.seed))
    return dataset


def test_promises_rates_and_pictures_are_those_of_the_pipeline(tmp_path):
    gone = {"base": (), "violence": ("violence",), "hate": ("hate",), "weighted sum": CATEGORIES}
    datasets = {model: _drawn(tmp_path / "d" / model.replace(" ", "_"), names) for model, names in gone.items()}
    experts = {model: tmp_path / f"{model}.safetensors" for model in gone if model != "base"}
    measured = {model: measure_dataset(dataset) for model, dataset in datasets.items()}
    result = DemoResult(CATEGORIES, measured, datasets, experts, {"train": 1.0})

    page, checks = write_demo_report(tmp_path / "out", result)

    assert len(checks) == 12 and all(check.kept for check in checks)
    report = json.loads(page.with_suffix(".json").read_text())
    assert [row["promise"] for row in report["promises"]] == [check.promise for check in checks]
    rates = {
        (row["arm"], row["group"]): row["rate"] for row in report["results"] if row["rule"] == report["primary_rule"]
    }
    assert rates["base", "violence"] == 1 and rates["violence", "violence"] == 0 and rates["violence", "hate"] == 1
    assert rates["weighted-sum", "all"] == rates["weighted-sum", "safe"] == 0
    assert "12 of 12 promises were kept" in page.read_text()
    assert report["seconds"]["train"] == 1.0
