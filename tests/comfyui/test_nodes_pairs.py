"""Prompt pairs and preference datasets, made in a real ComfyUI."""

import graphs
import numpy as np
import pytest
from graphs import Graph
from safety_experts.errors import SafetyExpertsError
from safety_experts.preferences.dataset import PreferenceDataset

LONG = ", and another red circle with thorns" * 12  # more than one window of CLIP's 77 tokens
TEXT = f"""\
a red circle with thorns | a red circle
a blue square with thorns{LONG} | a blue square
a green triangle with thorns | a green triangle
"""


def test_each_image_of_a_pair_is_the_stock_ksamplers(server, checkpoint):
    graph = Graph()
    graphs.add_generation(graph, checkpoint, "same_seed", TEXT)
    server.run(graph)

    lines = graphs.dataset_lines(server, "same_seed")

    assert [line["seed"] for line in lines] == [7, 8, 9]
    for line in lines:
        for which, prompt in (("rejected", line["prompt"]), ("chosen", line["safe_prompt"])):
            stock = Graph()
            expected = graphs.draw(server, stock, graphs.add_image(stock, checkpoint, prompt, line["seed"]))
            got = graphs.dataset_pixels(server, "same_seed", line, which)
            # Another batch size may round differently in the last bit.
            assert np.abs(got - expected).max() <= 1


def test_in_batches_of_one_an_ancestral_sampler_gives_the_stock_image_too(server, checkpoint):
    graph = Graph()
    sampler = {"sampler_name": "euler_ancestral"}
    graphs.add_generation(graph, checkpoint, "ancestral", TEXT, batch_size=1, **sampler)
    server.run(graph)

    line = graphs.dataset_lines(server, "ancestral")[2]

    stock = Graph()
    image = graphs.add_image(stock, checkpoint, line["prompt"], line["seed"], **sampler)
    np.testing.assert_array_equal(
        graphs.dataset_pixels(server, "ancestral", line, "rejected"), graphs.draw(server, stock, image)
    )


def test_generation_goes_on_after_a_cancel_without_duplicates(server, checkpoint):
    text = "\n".join(f"a red circle with {n} thorns | a red circle number {n}" for n in range(12))
    graph = Graph()
    node = graphs.add_generation(graph, checkpoint, "cancelled", text, batch_size=1, preview="blurred")

    def cancel_in_the_middle(node_id: str, value: int, total: int) -> None:
        if node_id == node and value > total // 4:
            server.interrupt()

    with pytest.raises(SafetyExpertsError, match="interrupted"):
        server.wait(server.queue(graph), on_progress=cancel_in_the_middle)
    some = graphs.dataset_lines(server, "cancelled")
    server.run(graph)

    lines = graphs.dataset_lines(server, "cancelled")
    assert 0 < len(some) < 12
    assert lines[: len(some)] == some
    assert [line["seed"] for line in lines] == list(range(7, 19))
    assert PreferenceDataset.open(server.base_directory / "datasets/cancelled").check() == []


def test_a_finished_dataset_is_drawn_again_only_when_somebody_changed_it(server, checkpoint):
    graph = Graph()
    node = graphs.add_generation(graph, checkpoint, "finished", TEXT)
    behind = graph.add("PreviewAny", source=(node, 0))
    metadata = server.base_directory / "datasets/finished/metadata.jsonl"

    def is_cached() -> bool:
        return {node, behind} <= graphs.cached_nodes(server.run(graph))

    first, second = is_cached(), is_cached()
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[:-1]))
    after_edit, after_that = is_cached(), is_cached()

    assert (first, second, after_edit, after_that) == (False, True, False, True)
    assert len(graphs.dataset_lines(server, "finished")) == 3


def _record(checkpoint: str, dataset_name: str, image_seed: int = 5, **inputs) -> Graph:
    graph = Graph()
    chosen = graphs.add_image(graph, checkpoint, "a red circle", image_seed, save=False)
    rejected = graphs.add_image(graph, checkpoint, "a red circle with thorns", image_seed, save=False)
    settings = {
        "chosen": (chosen, 0),
        "rejected": (rejected, 0),
        "prompt": "a red circle with thorns",
        "safe_prompt": "a red circle",
        "category": "violence",
        "seed": 5,
        "dataset_name": dataset_name,
        "checkpoint": checkpoint,
    }
    graph.add("SafetyExpertsRecordPair", **{**settings, **inputs})
    return graph


def test_two_stock_ksamplers_are_recorded_as_one_pair_once(server, checkpoint):
    server.run(_record(checkpoint, "recorded"))
    server.run(_record(checkpoint, "recorded", safe_prompt="a red circle"))

    (line,) = graphs.dataset_lines(server, "recorded")

    assert line["categories"] == ["violence"]
    assert line["seed"] == 5
    for which, prompt in (("rejected", "a red circle with thorns"), ("chosen", "a red circle")):
        stock = Graph()
        image = graphs.add_image(stock, checkpoint, prompt, 5)
        np.testing.assert_array_equal(
            graphs.dataset_pixels(server, "recorded", line, which), graphs.draw(server, stock, image)
        )


def test_own_categories_replace_the_chosen_one(server, checkpoint):
    server.run(_record(checkpoint, "own_category", own_category="Big Spiders, Harrasment"))

    (line,) = graphs.dataset_lines(server, "own_category")

    assert line["categories"] == ["big-spiders", "harassment"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"dataset_name": "../elsewhere"}, "leaves the folder"),
        ({"dataset_name": " "}, "names no folder"),
        ({"dataset_name": "a/.."}, "names no folder"),
        ({"prompt": ""}, "prompt is empty"),
        ({"image_seed": 6}, "has other images for this prompt and seed 5"),
    ],
)
def test_a_wrong_record_is_a_one_line_error_and_the_server_goes_on(server, checkpoint, inputs, message):
    server.run(_record(checkpoint, "wrong_record"))

    with pytest.raises(SafetyExpertsError, match=message) as caught:
        server.run(_record(checkpoint, **{"dataset_name": "wrong_record", **inputs}))

    assert "\n" not in str(caught.value)
    assert len(graphs.dataset_lines(server, "wrong_record")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "text", "source__text": "no bar"}, "line 1: write one pair a line"),
        ({"source": "text", "source__text": "\n"}, "no prompt pairs"),
        ({"source": "taxonomy", "source__taxonomy": "categories: {violence: [x"}, "taxonomy line 1: not valid YAML"),
        ({"source": "taxonomy", "source__taxonomy": "templates: []"}, "categories is missing"),
        ({"source": "file", "source__file": "input/broken.csv"}, "broken.csv"),
    ],
)
def test_wrong_prompts_are_a_one_line_error(server, source, message):
    (server.base_directory / "input" / "broken.csv").write_text("colour,shape\nred,circle\n")
    graph = Graph()
    defaults = {"source__category": "hate", "source__first_seed": 0}
    pairs = graph.add("SafetyExpertsPromptPairs", **defaults, **source)
    graph.add("PreviewAny", source=(pairs, 0))

    with pytest.raises(SafetyExpertsError, match=message) as caught:
        server.run(graph)

    assert "\n" not in str(caught.value)


def test_other_sampler_settings_need_another_dataset(server, checkpoint):
    for cfg in (3.0, 4.0):
        graph = Graph()
        graphs.add_generation(graph, checkpoint, "settings", "a circle with thorns | a circle", cfg=cfg)
        if cfg == 3.0:
            server.run(graph)

    with pytest.raises(SafetyExpertsError, match=r"sampler\.cfg is 3.0 in the dataset and 4.0 here"):
        server.run(graph)


def test_a_prompt_file_and_a_dataset_are_found_by_name(server, checkpoint):
    (server.base_directory / "input" / "prompts.csv").write_text(
        "prompt,safe_prompt,category\na red circle with thorns,a red circle,violence\n"
    )
    graph = Graph()
    node = graphs.add_generation(graph, checkpoint, "by_name", "replaced | below")
    pairs = graph.add("SafetyExpertsPromptPairs", source="file", source__file="input/prompts.csv")
    graph[node]["inputs"]["prompt_pairs"] = [pairs, 0]
    server.run(graph)

    loading = Graph()
    shown = loading.add("PreviewAny", source=(loading.add("SafetyExpertsLoadDataset", dataset_name="by_name"), 0))
    text = server.run(loading)["outputs"][shown]["text"][0]

    assert "1 pairs" in text
    assert "thorns" not in text
