"""The review page in the real server: same page, same handlers, below ComfyUI's dataset folders."""

import io
import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
from graphs import Graph
from PIL import Image
from review_datasets import make_review_dataset, reviews_on_disk

ROUTE = "/safety_experts/review"
PAIRS = [f"{index:016x}" for index in range(4)]


@pytest.fixture(scope="module")
def dataset(server):
    return make_review_dataset(server.base_directory / "datasets" / "review" / "pairs", 4)


def ask(server, path: str, body: dict | None = None, **headers: str) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, data, given), timeout=60) as answer:
        return answer.read()


def decide(server, pair_id: str, review: str | None, **headers: str) -> bytes:
    return ask(server, f"{ROUTE}/review", {"dataset": "review/pairs", "id": pair_id, "review": review}, **headers)


def review_counts(server) -> tuple[list[int], dict]:
    """Run Load → Review; return the numbers on its outputs and what it shows."""
    graph = Graph()
    loaded = graph.add("SafetyExpertsLoadDataset", dataset_name="review/pairs")
    reviewed = graph.add("SafetyExpertsReviewDataset", dataset=(loaded, 0), open_page=True)
    shown = [graph.add("PreviewAny", source=(reviewed, index)) for index in range(1, 5)]
    outputs = server.run(graph)["outputs"]
    return [int(outputs[node]["text"][0]) for node in shown], outputs[reviewed]["safety_experts_review"][0]


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_the_page_and_its_scripts_are_served_beside_each_other(server, dataset, prefix):
    assert b"Safety review" in ask(server, f"{prefix}{ROUTE}/")
    assert b"class Page" in ask(server, f"{prefix}{ROUTE}/page/main.mjs")
    assert "review/pairs" in json.loads(ask(server, f"{prefix}{ROUTE}/datasets"))["datasets"]


def test_comfyui_loads_the_extension_and_not_the_pages_own_scripts(server):
    files = [path for path in json.loads(ask(server, "/extensions")) if "safety-experts" in path]
    assert "/extensions/safety-experts/reviewing.js" in files
    assert not [path for path in files if "/review/" in path]


def test_decisions_on_the_page_are_the_nodes_next_counts(server, dataset):
    assert review_counts(server) == ([4, 0, 0, 0], {
        "dataset": "review/pairs", "open_page": True, "summary": "4 of 4 left to review"
    })  # fmt: skip
    for pair_id, review in zip(PAIRS, ("accepted", "flipped", "dropped", "dropped"), strict=True):
        decide(server, pair_id, review, Origin=server.url)
        assert reviews_on_disk(dataset)[pair_id] == review
    assert review_counts(server) == ([0, 1, 1, 2], {
        "dataset": "review/pairs", "open_page": False, "summary": "0 of 4 left to review"
    })  # fmt: skip


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"{ROUTE}/datasets", {"Host": "evil.example"}),
        (f"{ROUTE}/datasets", {"Origin": "http://evil.example"}),
        (f"{ROUTE}/datasets", {"Sec_Fetch_Site": "cross-site"}),
        (f"{ROUTE}/pairs?dataset=..", {}),
        (f"{ROUTE}/pairs?dataset={urllib.parse.quote('../models')}", {}),
        (f"{ROUTE}/pairs?dataset=review", {}),
        (f"{ROUTE}/pairs?dataset=%2Fetc", {}),
    ],
)
def test_the_real_server_refuses_too(server, dataset, path, headers):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, path, **headers)
    assert refused.value.code in (400, 403)


def test_no_prompt_reaches_the_log(server, dataset):
    ask(server, f"{ROUTE}/pairs?dataset=review/pairs")
    prompts = {json.loads(line)["prompt"] for line in (dataset / "metadata.jsonl").read_text().splitlines()}
    assert not [prompt for prompt in prompts if prompt in server.log_text()]


def test_compare_gives_the_pictures_of_both_sides(server):
    graph = Graph()
    before = graph.add("EmptyImage", width=16, height=8, batch_size=2, color=0xFF0000)
    after = graph.add("EmptyImage", width=16, height=8, batch_size=2, color=0x00FF00)
    node = graph.add("SafetyExpertsCompare", before=(before, 0), after=(after, 0), unsafe_side="before")
    shown = server.run(graph)["outputs"][node]["safety_experts_compare"][0]
    assert shown["unsafe_side"] == "before"
    for side, colour in (("before", (255, 0, 0)), ("after", (0, 255, 0))):
        assert len(shown[side]) == 2
        with Image.open(io.BytesIO(server.view(shown[side][1]))) as picture:
            assert picture.size == (16, 8) and picture.convert("RGB").getpixel((3, 3)) == colour
