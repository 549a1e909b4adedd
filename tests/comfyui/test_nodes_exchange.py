"""Importing other formats and parting a dataset, in a real ComfyUI."""

import pytest
from graphs import Graph
from PIL import Image
from safety_experts.errors import SafetyExpertsError
from safety_experts.preferences.dataset import DatasetInfo, NewPair, PreferenceDataset
from safety_experts.preferences.exporting import export_dataset
from safety_experts.preferences.pairs import PromptPair


@pytest.fixture(scope="module")
def exported(server, tmp_path_factory):
    """Twelve pairs as kohya's folders in ComfyUI's input folder; returns the dataset they are of."""
    dataset = PreferenceDataset.create(tmp_path_factory.mktemp("toy") / "toy", DatasetInfo({}, {}))
    dataset.add_many(
        NewPair(
            PromptPair(f"shape{n} of a colour{n} kind{n} with thorns", f"shape{n}", ("violence",), n),
            Image.new("RGB", (8, 8), (n, 200, 0)),
            Image.new("RGB", (8, 8), (n, 0, 200)),
        )
        for n in range(12)
    )
    export_dataset(dataset, "kohya", server.base_directory / "input" / "kohya")
    return dataset


def test_an_import_and_a_split_give_datasets_that_nodes_behind_take(server, exported):
    graph = Graph()
    made = graph.add(
        "SafetyExpertsImportDataset", format="kohya", source="input/kohya", dataset_name="imported", own_category=""
    )
    split = graph.add(
        "SafetyExpertsSplitDataset",
        dataset=(made, 0),
        held_out_share=0.25,
        near=0.8,
        seed=0,
        dataset_name="imported_split",
    )
    graph.add("SafetyExpertsReviewDataset", dataset=(split, 1), open_page=False)
    for _ in range(2):  # queued again it neither fails nor adds anything
        server.run(graph)
        folder = server.base_directory / "datasets"
        imported = PreferenceDataset.open(folder / "imported")
        parts = [PreferenceDataset.open(folder / "imported_split" / name) for name in ("train", "held-out")]
        assert imported.ids == exported.ids
        assert [len(part.pairs) for part in parts] == [9, 3]
        assert {*parts[0].ids, *parts[1].ids} == exported.ids
        graph[split]["inputs"]["near"] = 0.85  # runs anew, with the same parts
    graph[split]["inputs"]["held_out_share"] = 0.5
    with pytest.raises(SafetyExpertsError, match="another split"):
        server.run(graph)


@pytest.mark.parametrize("source", ["kohya", "input/../../secret", "input/nowhere", "/etc", "input/"])
def test_a_source_elsewhere_is_refused_before_anything_runs(server, source):
    graph = Graph()
    graph.add("SafetyExpertsImportDataset", format="kohya", source=source, dataset_name="never", own_category="")
    with pytest.raises(SafetyExpertsError):
        server.run(graph)
    assert not (server.base_directory / "datasets/never").exists()
