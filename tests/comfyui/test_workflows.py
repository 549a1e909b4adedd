"""The three example workflows, queued on the real server as the demo queues them, on fewer pairs."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from safety_experts.demo.demo_report import write_demo_report
from safety_experts.demo.pipeline import WORKFLOWS_FOLDER, DemoSize, load_workflow, run_pipeline
from safety_experts.errors import InputError
from safety_experts.experts.expert_file import load_expert

CATEGORIES = ("violence", "hate")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run of the demo with 8 training and 4 evaluation pairs a category; its log is checked inside."""
    out = tmp_path_factory.mktemp("demo")
    return out, run_pipeline(out, CATEGORIES, DemoSize(training_pairs=8, evaluation_pairs=4))


def test_the_workflows_write_pairs_experts_and_pictures(demo):
    out, result = demo
    base = out / "comfyui"
    pairs = [json.loads(line) for line in (base / "datasets/toy_pairs/metadata.jsonl").read_text().splitlines()]
    assert [pair["categories"] for pair in pairs].count(["violence"]) == 8 and len(pairs) == 16
    assert (base / "datasets/recorded_pairs/metadata.jsonl").read_text().count("\n") == 1
    for category in CATEGORIES:
        expert = load_expert(result.experts[category])
        assert expert.categories == [category] and expert.info.trained.num_pairs == 8
    for model in ("weighted sum", "row Co-Merge"):
        merged = load_expert(result.experts[model])
        assert set(merged.categories) == set(CATEGORIES) and len(merged.info.parents) == 2
    pictures = sorted((base / "output").glob("*.png"))  # those of the unsafe side are only looked at, and blurred
    assert [path.name for path in pictures] == [f"after_{number:05}_.png" for number in range(1, 9)]
    assert Image.open(pictures[0]).size == (64, 64)


def test_every_model_is_measured_on_the_same_prompts_and_the_report_shows_it(demo):
    out, result = demo
    assert list(result.measurements) == ["base", *CATEGORIES, "weighted sum", "row Co-Merge"]
    assert {measured["safe"].mark.num_images for measured in result.measurements.values()} == {8}
    prompts = {tuple(pair.id for pair in dataset.pairs) for dataset in result.datasets.values()}
    assert len(prompts) == 1
    page, checks = write_demo_report(Path(os.path.relpath(out)), result)  # as the command line names it
    numbers = json.loads(page.with_suffix(".json").read_text())
    rates = {(row["arm"], row["group"]): row for row in numbers["results"] if row["rule"] == numbers["primary_rule"]}
    assert {arm for arm, _ in rates} == {"base", *CATEGORIES, "weighted-sum", "row-Co-Merge"}
    assert rates["base", "violence"]["n"] == 4
    assert rates["base", "violence"]["rate"] == result.measurements["base"]["violence"].mark.value
    assert len(checks) == len(numbers["promises"]) == 12
    assert page.read_text().count("<img") >= 5 * 16


def test_the_demo_does_not_empty_a_folder_of_something_else(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match="no earlier demo wrote it"):
        run_pipeline(tmp_path, CATEGORIES, DemoSize(1, 1))
    assert (tmp_path / "photo.png").exists()


NAMES = sorted(path.stem for path in WORKFLOWS_FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_left_to_a_default(server, name):
    """A new input of a node must come into the workflow too, or the frontend would queue another graph than ours."""
    nodes = server.object_info()
    for number, node in load_workflow(name).items():
        inputs = nodes[node["class_type"]]["input"]
        for key, (kind, *more) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
            is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if is_widget and not (more and more[0].get("forceInput")):
                assert key in node["inputs"], f"{name}: {key} of node {number} ({node['class_type']}); make workflows"


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_workflow_holds_the_nodes_and_values_that_are_queued(name):
    """The browser test compares them exactly; this one needs no browser."""
    graph = load_workflow(name)
    folder = Path(__file__).resolve().parents[2] / "example_workflows"
    nodes = json.loads((folder / f"{name}.json").read_text())["nodes"]
    saved = {str(node["id"]): node for node in nodes if node["type"] != "MarkdownNote"}
    assert {number: node["class_type"] for number, node in graph.items()} == {
        number: node["type"] for number, node in saved.items()
    }
    for number, node in graph.items():
        values = [value for value in node["inputs"].values() if not isinstance(value, list)]
        widgets = saved[number].get("widgets_values") or []
        assert all(value in widgets for value in values), f"{name}: node {number}"
