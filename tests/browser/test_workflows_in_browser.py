"""A user's walk through the example workflows: open each in a real browser, press Run, look at what comes out.

    make test-browser        (Chromium at $CHROMIUM or /usr/bin/chromium; takes about ten minutes on two cores)

With SCREENSHOTS=<folder> the graphs are photographed after they ran.
"""

import json
import os
import time
import urllib.request
from pathlib import Path

import pytest
from frontend import Frontend, open_frontend
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = ["1_build_preference_dataset", "2_train_expert", "3_merge_and_apply"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        server.add_model(ensure_toy_checkpoint())
        yield server
        server.check_log()


@pytest.fixture
def frontend(server):
    with open_frontend(server.url) as frontend:
        yield frontend


def all_history(server: ComfyServer) -> dict:
    with urllib.request.urlopen(f"{server.url}/history") as answer:
        return json.loads(answer.read())


def open_example(frontend: Frontend, name: str) -> None:
    frontend.open_workflow(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), name)


def run_and_wait(server: ComfyServer, frontend: Frontend, name: str) -> dict:
    """Press Run, wait for the new history entry, and return it."""
    before = set(all_history(server))
    frontend.press_run()
    deadline = time.monotonic() + 1200
    while not (new := set(all_history(server)) - before):
        assert time.monotonic() < deadline, f"{name} did not finish"
        time.sleep(1)
    entry = all_history(server)[new.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    frontend.page.wait_for_timeout(2000)  # pictures arrive after the last message
    if folder := os.environ.get("SCREENSHOTS"):
        frontend.screenshot(Path(folder) / f"{name}.png")
    return entry


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_workflow_is_what_the_demo_queues(frontend, name):
    open_example(frontend, name)
    _, exported = frontend.export()
    expected = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert {number: node["inputs"] for number, node in exported.items()} == {
        number: node["inputs"] for number, node in expected.items()
    }


def test_the_three_workflows_run_one_after_the_other(server, frontend):
    base = server.base_directory
    open_example(frontend, NAMES[0])
    run_and_wait(server, frontend, NAMES[0])
    assert len((base / "datasets/toy_pairs/metadata.jsonl").read_text().splitlines()) == 96
    assert len((base / "datasets/recorded_pairs/metadata.jsonl").read_text().splitlines()) == 1

    open_example(frontend, NAMES[1])
    frontend.set_widget("SafetyExpertsTrain", category="hate", expert_name="hate")
    run_and_wait(server, frontend, NAMES[1])
    frontend.set_widget("SafetyExpertsTrain", category="violence", expert_name="violence")
    run_and_wait(server, frontend, NAMES[1])

    frontend.page.reload()
    frontend.wait_until_ready()
    open_example(frontend, NAMES[2])
    entry = run_and_wait(server, frontend, NAMES[2])
    names = {image["filename"] for output in entry["outputs"].values() for image in output.get("images", [])}
    assert {f"after_{number:05}_.png" for number in range(1, 5)} <= names
    (compared,) = [
        output["safety_experts_compare"][0]
        for output in entry["outputs"].values()
        if len(output) == 1 and "safety_experts_compare" in output
    ]
    assert len(compared["before"]) == len(compared["after"]) == 4
    assert sorted(path.name for path in (base / "output/loras").glob("*.safetensors")) == [
        "hate_00001_.safetensors",
        "merged_00001_.safetensors",
        "violence_00001_.safetensors",
    ]
