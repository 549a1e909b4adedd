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
from safetensors.torch import load_file, save_file
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.experts.expert_file import load_expert

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
PARTS = {
    "diffusion_models": "model.diffusion_model.",
    "text_encoders": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}
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


def test_workflow_4_draws_trains_and_applies_on_separate_files(server, frontend):
    base = server.base_directory
    weights = load_file(ensure_toy_checkpoint())
    for folder, prefix in PARTS.items():
        (base / "models" / folder).mkdir(exist_ok=True)
        part = {key.removeprefix(prefix): value.clone() for key, value in weights.items() if key.startswith(prefix)}
        save_file(part, base / "models" / folder / "toy.safetensors")
    frontend.page.reload()  # the new files are in its lists
    frontend.wait_until_ready()
    name = "4_train_on_the_model"
    open_example(frontend, name)
    frontend.set_widget("UNETLoader", unet_name="toy.safetensors")
    frontend.set_widget("CLIPLoader", clip_name="toy.safetensors", type="stable_diffusion")
    frontend.set_widget("VAELoader", vae_name="toy.safetensors")
    text = "a red circle with thorns | a red circle\na blue square with thorns | a blue square"
    frontend.set_widget("SafetyExpertsPromptPairs", source="text")
    frontend.set_widget("SafetyExpertsPromptPairs", **{"source.text": text, "source.category": "violence"})
    frontend.set_widget("SafetyExpertsGeneratePairs", steps=4, width=64, height=64)
    frontend.set_widget("SafetyExpertsTrain", recipe_name="toy")
    frontend.set_widget("EmptySD3LatentImage", width=64, height=64)
    entry = run_and_wait(server, frontend, name)

    expert = load_expert(base / "output" / "loras" / "z_image_violence_00001_.safetensors")
    assert expert.info.base_checkpoint.name == "toy.safetensors" and expert.info.trained.finished
    assert [image["filename"] for output in entry["outputs"].values() for image in output.get("images", [])]
