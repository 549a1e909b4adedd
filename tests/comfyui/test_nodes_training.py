"""Training in a real ComfyUI: a few steps on a few pairs of the test model."""

import io
import json
import math
import urllib.error
import urllib.request

import graphs
import numpy as np
import pytest
import torch
from graphs import Graph
from PIL import Image
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert_file import load_expert

TEXT = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("red", "green", "blue", "yellow"))
MESSAGE = "safety_experts.message"
OVERRIDES = (
    "batch_size=2  # of 4 pairs\nanchor_weight=0\nsft_weight=0\nschedule=constant\nsave_steps=1000\nprecision=fp32\n"
)


@pytest.fixture(scope="session")
def dataset(server, checkpoint) -> str:
    graph = Graph()
    graphs.add_generation(graph, checkpoint, "to_train_on", TEXT)
    server.run(graph)
    return "to_train_on"


def _train(dataset: str, expert_name: str, steps: int = 3, overrides: str = "", **inputs) -> tuple[Graph, str]:
    graph = Graph()
    recipe = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=f"{OVERRIDES}steps={steps}\n{overrides}")
    settings = {"checkpoint": "(the one that drew the dataset)", "category": "all", "recipe_name": "toy"}
    node = graph.add(
        "SafetyExpertsTrain",
        dataset=(graph.add("SafetyExpertsLoadDataset", dataset_name=dataset), 0),
        recipe=(recipe, 0),
        expert_name=expert_name,
        **{**settings, **inputs},
    )
    return graph, node


def read_lines(server, name: str) -> list[str]:
    return _expert_path(server, name).read_text().splitlines()


def _expert_path(server, name: str):
    return server.base_directory / "output" / "loras" / name


def test_a_trained_expert_loads_in_the_stock_loaders_with_every_key(server, checkpoint, dataset):
    graph, node = _train(dataset, "stock")
    shown = graph.add("PreviewAny", source=(node, 2))
    losses = graph.add("PreviewAny", source=(node, 1))
    loader = graphs.checkpoint_loader(graph, checkpoint)
    applied = graph.add("LoraModelLoader", model=(loader, 0), lora=(node, 0), strength_model=1.0, bypass=False)
    from_socket = graphs.add_image(graph, checkpoint, "a red circle with thorns", 7, model=(applied, 0))
    socket_image = graphs.draw(server, graph, from_socket)
    outputs = server.run(graph)["outputs"]
    (name,) = outputs[shown]["text"]

    stock = Graph()
    loader = graphs.checkpoint_loader(stock, checkpoint)
    applied = stock.add(
        "LoraLoader", model=(loader, 0), clip=(loader, 1), lora_name=name, strength_model=1.0, strength_clip=1.0
    )
    image = graphs.draw(
        server, stock, graphs.add_image(stock, checkpoint, "a red circle with thorns", 7, model=(applied, 0))
    )

    assert name == "stock_00001_.safetensors"
    assert (socket_image == image).all()
    server.check_log()
    expert = load_expert(_expert_path(server, name))
    assert expert.categories == ["violence"]
    assert expert.info.base_checkpoint.name == checkpoint
    curve = json.loads(outputs[losses]["text"][0])["loss"]
    assert len(curve) == 3
    assert curve[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_finished_training_runs_again_only_when_the_dataset_changed(server, dataset):
    graph, node = _train(dataset, "cached")
    metadata = server.base_directory / "datasets" / dataset / "metadata.jsonl"

    def is_cached() -> bool:
        return node in graphs.cached_nodes(server.run(graph))

    first, second = is_cached(), is_cached()
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    lines[0]["review"] = "dropped"
    original = metadata.read_text()
    try:
        metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
        after_edit = is_cached()
    finally:
        metadata.write_text(original)

    assert (first, second, after_edit) == (False, True, False)
    assert len(list(_expert_path(server, "").glob("cached_*_.safetensors"))) == 2


def test_cancel_saves_the_expert_and_resuming_gives_the_uninterrupted_one(server, dataset):
    steps = 30
    graph, node = _train(dataset, "cancelled", steps=steps)

    def cancel_after_a_few_steps(node_id: str, value: int, total: int) -> None:
        if node_id == node and total == steps and value >= 3:
            server.interrupt()

    said: list[str] = []
    with pytest.raises(SafetyExpertsError, match="interrupted"):
        server.wait(
            server.queue(graph),
            on_progress=cancel_after_a_few_steps,
            on_event=lambda kind, data: kind == MESSAGE and said.append(data["text"]),
        )
    saved = load_expert(_expert_path(server, "cancelled_00001_.safetensors"))
    loading = Graph()
    loading.add("PreviewAny", source=(loading.add("SafetyExpertsLoad", expert_name="cancelled_00001_.safetensors"), 0))
    server.run(loading, on_event=lambda kind, data: kind == MESSAGE and said.append(data["text"]))
    resumed, _ = _train(dataset, "cancelled", steps=steps, resume=True)
    server.run(resumed)
    straight, _ = _train(dataset, "straight", steps=steps)
    server.run(straight)

    assert 3 <= saved.info.trained.step < steps
    assert not saved.info.trained.finished
    assert f"the expert of step {saved.info.trained.step} is saved as cancelled_00001_.safetensors" in said[0]
    assert f"step {saved.info.trained.step} of {steps}, unfinished" in said[1]
    assert len(read_lines(server, "cancelled_00002_.metrics.jsonl")) == steps  # the steps before the cancel too
    experts = [
        load_expert(_expert_path(server, f"{name}_.safetensors")) for name in ("cancelled_00002", "straight_00001")
    ]
    assert experts[0].info.trained.step == steps
    assert experts[0].tensors_sha256() == experts[1].tensors_sha256()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"overrides": "stepz=3"}, "unknown field 'stepz'"),
        ({"overrides": "steps=-1"}, "steps"),
        ({"overrides": "steps"}, "'steps' is not of the form key=value"),
        ({"overrides": "batch_size=3", "processes": 2}, "batch_size 3 cannot be shared by 2 processes"),
        ({"category": "hate"}, "no pairs of category 'hate'"),
        ({"category": "hate", "own_category": "Big Spiders"}, "no pairs of category 'big-spiders'"),
        ({"expert_name": "../wrong"}, "leaves the folder"),
        ({"expert_name": ""}, "name is empty"),
        ({"checkpoint": "unknown.safetensors"}, "unknown.safetensors"),
    ],
)
def test_a_wrong_training_is_a_one_line_error_and_leaves_no_file(server, dataset, inputs, message):
    checkpoints = server.base_directory / "models" / "checkpoints"
    (checkpoints / "unknown.safetensors").write_bytes(b"no model")
    graph, _ = _train(dataset, **{"expert_name": "wrong", "steps": 5, **inputs})

    with pytest.raises(SafetyExpertsError, match=message) as caught:
        server.run(graph)

    assert "\n" not in str(caught.value)
    assert not list(_expert_path(server, "").rglob("wrong*"))
    assert not list(_expert_path(server, "").rglob("*.resume"))


EXPLOSIVE = "learning_rate=1e30\nbeta=1e9"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_explodes_is_one_line_and_keeps_the_state(server, dataset, processes):
    name = f"exploded{processes}"
    graph, _ = _train(dataset, name, overrides=EXPLOSIVE, processes=processes)

    with pytest.raises(
        SafetyExpertsError, match=rf"became (nan|inf) at step 2 of 3; .*{name}_00001_\.resume"
    ) as caught:
        server.run(graph)

    assert "\n" not in str(caught.value)
    # No expert; the state, and the record that lets the run page show where the loss went.
    left = {path.name for path in _expert_path(server, "").glob(f"{name}*")}
    assert left == {f"{name}_00001_{ending}" for ending in (".resume", ".run", ".metrics.jsonl")}


def test_the_preview_shows_curves_and_samples_of_a_pair_before_and_now(server, dataset):
    def last_preview(**inputs) -> Image.Image:
        previews: list[bytes] = []
        graph, _ = _train(dataset, "watched", **inputs)
        server.run(graph, on_preview=previews.append)
        return Image.open(io.BytesIO(previews[-1])).convert("RGB")

    plain, with_samples = last_preview(), last_preview(sample_every=2, train_again=True)

    assert (plain.size, with_samples.size) == ((768, 420), (768, 640))
    # Four pictures of 64 px, enlarged to 184 below a line of text: the unsafe prompt's are blurred, the safe one's not.
    pixels = np.asarray(with_samples).astype(int)
    contrast = [np.abs(np.diff(pixels[460:620, left + 12 : left + 180], axis=1)).max() for left in (0, 192, 384, 576)]
    assert max(contrast[:2]) < min(contrast[2:]) / 2


def test_a_finished_training_is_given_back_when_it_is_queued_again_and_trained_again_only_when_asked(server, dataset):
    def run(**inputs) -> tuple[str, list[float], list[str]]:
        texts: list[str] = []
        graph, node = _train(dataset, "once", **inputs)
        name, losses = (graph.add("PreviewAny", source=(node, slot)) for slot in (2, 1))
        outputs = server.run(graph, on_event=lambda kind, data: kind == MESSAGE and texts.append(data["text"]))[
            "outputs"
        ]
        return outputs[name]["text"][0], json.loads(outputs[losses]["text"][0])["loss"], texts

    first = run()
    # Another input, so that ComfyUI's own cache does not answer.
    again, resumed = run(sample_every=7), run(sample_every=8, resume=True)
    asked, other = run(train_again=True), run(steps=2)

    assert first[0] == again[0] == resumed[0] == "once_00001_.safetensors"
    assert first[1] == again[1] and len(first[1]) == 3
    assert first[2] == [] and "once_00001_.safetensors is this very training" in again[2][0] == resumed[2][0]
    assert asked[0] == "once_00002_.safetensors" and other[0] == "once_00003_.safetensors"


def test_train_merge_and_apply_fit_in_one_graph_and_a_linked_name_loads(server, checkpoint, dataset):
    graph, node = _train(dataset, "one_graph")
    loaded = graph.add("SafetyExpertsLoad", expert_name=(node, 2))
    merged = graph.add(
        "SafetyExpertsMerge", experts__expert_0=(node, 3), experts__expert_1=(loaded, 0), method="average"
    )
    applied = graphs.add_apply(graph, checkpoint, (merged, 0))
    image = graphs.add_image(graph, checkpoint, "a red circle with thorns", 7, model=(applied, 0), clip=(applied, 1))

    assert graphs.draw(server, graph, image).std() > 1


def test_nothing_to_resume_is_said(server, dataset):
    graph, _ = _train(dataset, "never_trained", resume=True)

    with pytest.raises(SafetyExpertsError, match="nothing to resume for never_trained"):
        server.run(graph)


def test_the_recipe_follows_the_models_family_and_one_of_another_family_is_said(server, dataset):
    texts: list[str] = []
    for name, recipe in (("by_family", "auto"), ("not_by_family", "sdxl")):
        graph, node = _train(dataset, name)
        del graph[node]["inputs"]["recipe"]
        graph[node]["inputs"]["recipe_name"] = recipe

        def cancel(node_id: str, value: int, total: int, node=node) -> None:
            if node_id == node and total == 2000:
                server.interrupt()

        with pytest.raises(SafetyExpertsError, match="interrupted"):
            server.run(
                graph, on_progress=cancel, on_event=lambda kind, data: kind == MESSAGE and texts.append(data["text"])
            )

    assert load_expert(_expert_path(server, "by_family_00001_.safetensors")).info.trained.recipe["name"] == "sd15"
    assert [text for text in texts if "is not made for" in text] == [
        "recipe sdxl is not made for this model of family sd15: sd15 is"
    ]


def _without_rounding(expert, other) -> bool:
    return all(
        torch.allclose(value, other.state_dict()[name], rtol=1e-2, atol=1e-5)
        for name, value in expert.state_dict().items()
    )


def test_two_processes_train_what_one_trains_and_report_it_in_the_graph(server, dataset):
    experts, curves, seen = [], [], []
    for name, processes in (("alone", 1), ("shared", 2)):
        graph, node = _train(dataset, name, processes=processes, sample_every=2)
        losses = graph.add("PreviewAny", source=(node, 1))
        previews: list[bytes] = []
        entry = server.run(
            graph,
            on_preview=previews.append,
            on_progress=lambda node_id, value, total, node=node: seen.append((node_id == node, value, total)),
        )
        curves.append(json.loads(entry["outputs"][losses]["text"][0])["loss"])
        experts.append(load_expert(_expert_path(server, f"{name}_00001_.safetensors")))
        assert Image.open(io.BytesIO(previews[-1])).size == (768, 640)
    assert (True, 3, 3) in seen
    assert curves[0] == pytest.approx(curves[1], rel=1e-3) and len(curves[1]) == 3
    assert experts[0].info.trained.recipe == experts[1].info.trained.recipe
    assert _without_rounding(*experts)


def test_cancel_stops_several_processes_and_saves(server, dataset):
    steps = 200
    graph, node = _train(dataset, "halted", steps=steps, processes=2)

    def cancel_after_a_few_steps(node_id: str, value: int, total: int) -> None:
        if node_id == node and total == steps and value >= 3:
            server.interrupt()

    with pytest.raises(SafetyExpertsError, match="interrupted"):
        server.wait(server.queue(graph), on_progress=cancel_after_a_few_steps)

    expert = load_expert(_expert_path(server, "halted_00001_.safetensors"))
    assert 3 <= expert.info.trained.step < steps
    assert _expert_path(server, "halted_00001_.resume").exists()


def test_a_dataset_whose_checkpoint_is_gone_says_so(server, dataset):
    description = server.base_directory / "datasets" / dataset / "dataset.json"
    original = description.read_text()
    info = json.loads(original)
    info["base_checkpoint"]["name"] = "gone.safetensors"
    description.write_text(json.dumps(info))
    metadata = description.with_name("metadata.jsonl")
    metadata.touch()  # what a change of the dataset is known by
    graph, _ = _train(dataset, "gone")

    try:
        with pytest.raises(SafetyExpertsError, match=r"'gone\.safetensors', is not in ComfyUI's checkpoints folders"):
            server.run(graph)
    finally:
        description.write_text(original)
        metadata.touch()


def test_an_empty_dataset_is_a_one_line_error(server, dataset):
    empty = server.base_directory / "datasets" / "empty"
    empty.mkdir()
    (empty / "dataset.json").write_bytes((empty.with_name(dataset) / "dataset.json").read_bytes())
    graph, _ = _train("empty", "empty")

    with pytest.raises(SafetyExpertsError, match="empty has no pairs to train on"):
        server.run(graph)


def test_a_truncated_image_is_named(server, dataset):
    folder = server.base_directory / "datasets" / dataset
    line = graphs.dataset_lines(server, dataset)[0]
    image = folder / line["chosen_file_name"]
    original = image.read_bytes()
    image.write_bytes(original[: len(original) // 2])
    (folder / "metadata.jsonl").touch()
    graph, _ = _train(dataset, "truncated")

    try:
        with pytest.raises(SafetyExpertsError, match=image.name):
            server.run(graph)
    finally:
        image.write_bytes(original)
        (folder / "metadata.jsonl").touch()
    server.run(graph)


def test_stop_and_keep_gives_the_graph_the_expert_and_its_samples(server, dataset):
    """As the panel's buttons do it: by the route, while it trains."""
    graph, node = _train(dataset, "kept", steps=500, sample_every=500)
    shown = graph.add("PreviewAny", source=(node, 2))
    pictures = [graph.add("SaveImage", images=(node, slot), filename_prefix="sample") for slot in (4, 5)]
    asked: list[str] = []

    def ask_after_a_few_steps(node_id: str, value: int, total: int) -> None:
        due = {1: "sample", 2: "save", 3: "stop"}.get(len(asked) + 1)
        if node_id == node and total == 500 and value >= 2 + len(asked) and due:
            ask(server, {"run": "kept_00001_", "request": due})
            asked.append(due)

    entry = server.wait(server.queue(graph), on_progress=ask_after_a_few_steps)
    assert asked == ["sample", "save", "stop"]
    assert entry["outputs"][shown]["text"] == ["kept_00001_.safetensors"]
    assert all(len(entry["outputs"][node]["images"]) == 2 for node in pictures)
    assert entry["outputs"][node]["safety_experts_run"] == [{"run": "kept_00001_"}]
    with urllib.request.urlopen(f"{server.url}/safety_experts/run/state?run=kept_00001_&since=0") as answer:
        state = json.loads(answer.read())
    assert (state["is_active"], state["state"], len(state["prompts"])) == (False, "stopped", 2)
    assert len(state["metrics"]) == state["step"] >= 4 and state["metrics"][0]["loss"] > 0
    assert state["saved"] == [path.name for path in _expert_path(server, "").glob("kept_*_step_*")]
    assert state["samples"][0][0] == 0 and len(state["samples"]) == 2
    assert _expert_path(server, "kept_00001_.preview.png").is_file()
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, {"run": "kept_00001_", "request": "stop"})
    assert refused.value.code == 409


def ask(server, body: dict) -> None:
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/safety_experts/run/ask"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60).close()
