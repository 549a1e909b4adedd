"""Prompt pairs and preference datasets, made in a real ComfyUI."""

from io import BytesIO

import graphs
import numpy as np
import pytest
from graphs import Graph
from PIL import Image
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.errors import SafetyExpertsError
from safety_experts.preferences.dataset import ImageToImage, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair, write_prompt_pairs

LONG = ", and another red circle with thorns" * 12  # more than one window of CLIP's 77 tokens
SHORT = "a red circle with thorns | a red circle\na green triangle with thorns | a green triangle"
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


def _two_ksamplers(checkpoint: str, line: dict, denoise: float, negates_unsafe: bool) -> tuple[Graph, str, str]:
    """The stock graph of a pair whose safe image starts from the unsafe one; the ids of both saved images."""
    graph = Graph()
    saved = graphs.add_image(graph, checkpoint, line["prompt"], line["seed"])
    loader = graphs.checkpoint_loader(graph, checkpoint)
    (unsafe,) = (node for node in graph if graph[node]["class_type"] == "KSampler")
    sampler = dict(graph[unsafe]["inputs"])
    sampler |= {
        "positive": [graph.add("CLIPTextEncode", clip=(loader, 1), text=line["safe_prompt"]), 0],
        "negative": sampler["positive"] if negates_unsafe else sampler["negative"],
        "latent_image": [unsafe, 0],
        "denoise": denoise,
    }
    safe = graph.add("KSampler", **sampler)
    decoded = graph.add("VAEDecode", samples=(safe, 0), vae=(loader, 2))
    return graph, saved, graph.add("SaveImage", images=(decoded, 0), filename_prefix="test")


@pytest.mark.parametrize("negates_unsafe", [False, True])
def test_a_safe_image_from_the_unsafe_one_is_what_two_stock_ksamplers_draw(server, checkpoint, negates_unsafe):
    name = f"image_to_image_{negates_unsafe}"
    graph = Graph()
    graphs.add_generation(graph, checkpoint, name, TEXT, denoise=0.6, negate_unsafe=negates_unsafe)
    server.run(graph)

    lines = graphs.dataset_lines(server, name)

    for line in lines[:2]:  # one of them longer than the other side
        stock, *saved = _two_ksamplers(checkpoint, line, 0.6, negates_unsafe)
        for which, node in zip(("rejected", "chosen"), saved, strict=True):
            expected = graphs.draw(server, stock, node)
            assert np.abs(graphs.dataset_pixels(server, name, line, which) - expected).max() <= 1
    info = PreferenceDataset.open(server.base_directory / "datasets" / name).info
    assert info.image_to_image == ImageToImage(0.6, negates_unsafe)
    with pytest.raises(SafetyExpertsError, match=r"the chosen image starts from the rejected one .* and from noise"):
        server.run(_generation(checkpoint, name))
    with pytest.raises(SafetyExpertsError, match="negate_unsafe needs a denoise below 1"):
        server.run(_generation(checkpoint, "never", negate_unsafe=True))


def _generation(checkpoint: str, name: str, text: str = TEXT, **inputs) -> Graph:
    graph = Graph()
    graphs.add_generation(graph, checkpoint, name, text, **inputs)
    return graph


@pytest.mark.parametrize("denoise", [1.0, 0.6])
def test_the_command_draws_what_the_node_draws(server, checkpoint, tmp_path, denoise):
    name = f"as_the_command_{denoise}"
    sampler = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "steps": 6}
    server.run(_generation(checkpoint, name, SHORT, denoise=denoise, **sampler))
    by_node = server.base_directory / "datasets" / name
    prompts = tmp_path / "prompt_pairs.jsonl"
    write_prompt_pairs(
        prompts,
        [PromptPair(p.prompt, p.safe_prompt, p.categories, p.seed) for p in PreferenceDataset.open(by_node).pairs],
    )
    words = ["dataset", "build", "--model", server.base_directory / "models" / "checkpoints" / checkpoint]
    words += ["--prompts", prompts, "--out", tmp_path / "out", "--tokenizer", find_comfyui() / "comfy/sd1_tokenizer"]
    words += ["--width", graphs.SIZE_PX, "--height", graphs.SIZE_PX, "--steps", 6, "--guidance", 3.0, "--karras"]
    words += ["--precision", "fp32", "--device", "cpu", "--json"]
    words += ["--image-to-image", denoise] if denoise < 1 else []
    assert run([str(word) for word in words]) == 0

    by_command = PreferenceDataset.open(tmp_path / "out")

    assert by_command.info.image_to_image == PreferenceDataset.open(by_node).info.image_to_image
    for pair in by_command.pairs:
        for path in by_command.image_paths(pair):
            found, expected = (
                np.asarray(Image.open(file)).astype(int) for file in (path, by_node / "images" / path.name)
            )
            assert np.abs(found - expected).max() <= 1 and expected.std() > 10


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

    def pictures() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in metadata.parent.glob("images/*.png")}

    first, second = is_cached(), is_cached()
    drawn = pictures()
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[1:]))
    for path in metadata.parent.glob("images/*.png"):
        path.write_bytes(b"")
    after_edit, after_that = is_cached(), is_cached()
    redrawn = {name: data for name, data in pictures().items() if data}

    assert (first, second, after_edit, after_that) == (False, True, False, True)
    assert len(graphs.dataset_lines(server, "finished")) == 3
    # Drawn in the company that it had before, so the last bit is the same.
    assert len(redrawn) == 2 and redrawn.items() <= drawn.items()


def _record(
    checkpoint: str,
    dataset_name: str,
    image_seed: int = 5,
    rejected_seed: int | None = None,
    cfg: float = 3.0,
    **inputs,
) -> Graph:
    graph = Graph()
    rejected_seed = image_seed if rejected_seed is None else rejected_seed
    chosen = graphs.add_image(graph, checkpoint, "a red circle", image_seed, save=False, cfg=cfg)
    rejected = graphs.add_image(graph, checkpoint, "a red circle with thorns", rejected_seed, save=False, cfg=cfg)
    settings = {
        "chosen": (chosen, 0),
        "rejected": (rejected, 0),
        "prompt": "a red circle with thorns",
        "safe_prompt": "a red circle",
        "category": "violence",
        "seed": 0,
        "dataset_name": dataset_name,
        "checkpoint": checkpoint,
    }
    graph.add("SafetyExpertsRecordPair", **{**settings, **inputs})
    return graph


def test_two_stock_ksamplers_are_recorded_as_one_pair_once_with_their_seed(server, checkpoint):
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


def test_a_pair_of_two_seeds_is_refused_and_a_seed_of_a_workflow_made_before_is_not_believed(server, checkpoint):
    with pytest.raises(SafetyExpertsError, match="chosen was drawn with seed 5 and rejected with seed 6"):
        server.run(_record(checkpoint, "two_seeds", rejected_seed=6))

    server.run(_record(checkpoint, "two_seeds", seed=9))

    assert [line["seed"] for line in graphs.dataset_lines(server, "two_seeds")] == [5]


def test_pictures_without_a_sampler_have_an_unknown_seed_and_every_pair_is_kept(server, checkpoint):
    for colour in (100, 200):
        graph = Graph()
        images = [
            graph.add("EmptyImage", width=64, height=64, batch_size=2, color=value) for value in (colour, colour + 1)
        ]
        graph.add(
            "SafetyExpertsRecordPair",
            chosen=(images[0], 0),
            rejected=(images[1], 0),
            prompt="a red circle with thorns",
            category="violence",
            seed=0,
            dataset_name="found",
            checkpoint=checkpoint,
        )
        server.run(graph)
        server.run(graph)  # nothing new

    assert [line["seed"] for line in graphs.dataset_lines(server, "found")] == [None, None]


def _shown(server, graph: Graph) -> np.ndarray:
    (output,) = server.run(graph)["outputs"].values()
    return np.asarray(Image.open(BytesIO(server.view(output["images"][0]))).convert("RGB")).astype(int)


def test_the_recorded_pair_is_shown_with_the_unsafe_picture_blurred_until_the_setting_says_not(server, checkpoint):
    settings = server.base_directory / "user" / "default" / "comfy.settings.json"
    blurred = _shown(server, _record(checkpoint, "shown", image_seed=21))
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('{"SafetyExperts.BlurUnsafe": false}')
    try:
        sharp = _shown(server, _record(checkpoint, "shown", image_seed=22))
    finally:
        settings.unlink()

    lines = graphs.dataset_lines(server, "shown")
    assert blurred.shape == (64, 128, 3)
    for picture, line in ((blurred, lines[0]), (sharp, lines[1])):
        np.testing.assert_array_equal(picture[:, 64:], graphs.dataset_pixels(server, "shown", line, "chosen"))
    np.testing.assert_array_equal(sharp[:, :64], graphs.dataset_pixels(server, "shown", lines[1], "rejected"))
    unblurred = graphs.dataset_pixels(server, "shown", lines[0], "rejected")
    edges = [np.abs(np.diff(picture, axis=1)).max() for picture in (blurred[:, :64], unblurred)]
    assert edges[0] < edges[1] / 4


@pytest.mark.parametrize(
    "inputs", [{"category": "Big Spiders, Harrasment"}, {"category": "hate", "own_category": "Big Spiders, Harrasment"}]
)
def test_a_category_of_ones_own_as_the_list_takes_it_now_and_as_older_workflows_say_it(server, checkpoint, inputs):
    name = f"own_category_{len(inputs)}"
    server.run(_record(checkpoint, name, **inputs))

    (line,) = graphs.dataset_lines(server, name)

    assert line["categories"] == ["big-spiders", "harassment"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"dataset_name": "../elsewhere"}, "leaves the folder"),
        ({"dataset_name": " "}, "names no folder"),
        ({"dataset_name": "a/.."}, "names no folder"),
        ({"prompt": ""}, "prompt is empty"),
        ({"category": "own …"}, "category is not named"),
        ({"category": "?!"}, "has no letter or digit"),
    ],
)
def test_a_wrong_record_is_refused_before_anything_runs(server, checkpoint, inputs, message):
    with pytest.raises(
        SafetyExpertsError, match=f"refused the workflow: .*SafetyExpertsRecordPair.*{message}"
    ) as caught:
        server.queue(_record(checkpoint, **{"dataset_name": "wrong_record", **inputs}))

    assert "\n" not in str(caught.value)


def test_other_images_for_a_pair_it_has_are_refused(server, checkpoint):
    server.run(_record(checkpoint, "wrong_record"))

    with pytest.raises(SafetyExpertsError, match="has other images for this prompt and seed 5"):
        server.run(_record(checkpoint, "wrong_record", cfg=7.0))

    assert len(graphs.dataset_lines(server, "wrong_record")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "text", "source__text": "no bar"}, "line 1: write one pair a line"),
        ({"source": "text", "source__text": "\n"}, "no prompt pairs"),
        ({"source": "text", "source__text": "a | b", "source__category": "own …"}, "category is not named"),
        ({"source": "taxonomy", "source__taxonomy": "categories: {violence: [x"}, "taxonomy line 1: not valid YAML"),
        ({"source": "taxonomy", "source__taxonomy": "templates: []"}, "categories is missing"),
        ({"source": "file", "source__file": "input/broken.csv"}, "broken.csv"),
        ({"source": "file", "source__file": "input/../../outside.csv"}, "leaves the folder"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(server, source, message):
    (server.base_directory / "input" / "broken.csv").write_text("colour,shape\nred,circle\n")
    graph = Graph()
    pairs = graph.add("SafetyExpertsPromptPairs", **{"source__category": "hate", "source__first_seed": 0, **source})
    graph.add("PreviewAny", source=(pairs, 0))

    with pytest.raises(SafetyExpertsError, match=f"refused the workflow: .*{message}") as caught:
        server.queue(graph)

    assert "\n" not in str(caught.value)


def test_prompts_from_a_link_are_read_when_it_runs(server):
    graph = Graph()
    text = graph.add("PrimitiveStringMultiline", value="no bar")
    pairs = graph.add(
        "SafetyExpertsPromptPairs",
        source="text", source__text=(text, 0), source__category="hate", source__first_seed=0,
    )  # fmt: skip
    graph.add("PreviewAny", source=(pairs, 0))

    prompt_id = server.queue(graph)
    with pytest.raises(SafetyExpertsError, match="line 1: write one pair a line"):
        server.wait(prompt_id)

    messages = dict(server.history(prompt_id)["status"]["messages"])
    assert messages["execution_error"]["exception_type"] == "safety_experts.errors.InputError"


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


def test_no_mistake_writes_the_persons_words_into_the_log_or_the_message(server, checkpoint):
    word = "unmentionable"
    (server.base_directory / "input" / "no_header.csv").write_text(f"a {word} thing,a thing\n")
    prompts = [
        {"source": "text", "source__text": f"a {word} thing"},
        {"source": "text", "source__text": f"a {word} thing | a {word} thing"},
        {"source": "taxonomy", "source__taxonomy": f"categories: {{violence: [{word}"},
        {"source": "taxonomy", "source__taxonomy": f"categories: {{violence: [{word}]}}\ntemplates: [{word}]"},
        {"source": "taxonomy", "source__taxonomy": f"templates: [{{prompt: '{{{word}}}', safe_prompt: a}}]"},
        {"source": "file", "source__file": "input/no_header.csv"},
    ]
    graphs_of_mistakes = []
    for source in prompts:
        graph = Graph()
        pairs = graph.add("SafetyExpertsPromptPairs", **{"source__category": "hate", "source__first_seed": 0, **source})
        graph.add("PreviewAny", source=(pairs, 0))
        graphs_of_mistakes.append(graph)
    for negative in ("", word):
        graph = Graph()
        text = f"a {word} circle | a circle"
        graphs.add_generation(graph, checkpoint, "words", text, negative_prompt=negative, steps=1)
        graphs_of_mistakes.append(graph)
    server.run(graphs_of_mistakes.pop(-2))
    graphs_of_mistakes.append(_record(checkpoint, "words", prompt=f"a {word} circle", rejected_seed=6))

    for graph in graphs_of_mistakes:
        with pytest.raises(SafetyExpertsError) as caught:
            server.run(graph)
        assert word not in str(caught.value)

    assert word not in server.log_text()
