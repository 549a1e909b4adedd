"""What a person reads after a mistake, without a click: the pack's own toasts (SCREENSHOTS=<folder> keeps pictures)."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import graphs
import pytest
from frontend import Frontend, open_frontend
from graphs import Graph
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint

TOASTS = ".p-toast-message"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(base) as server:
        server.add_model(ensure_toy_checkpoint())
        script = Path(__file__).parents[1] / "comfyui" / "save_small_wan.py"
        environment = {**os.environ, "COMFYUI_PATH": str(server.comfyui)}
        (base / "models" / "vae").mkdir(exist_ok=True)
        subprocess.run([sys.executable, str(script), str(base / "models" / "vae")], env=environment, check=True)
        text = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("red", "green", "blue"))
        graph = Graph()
        graphs.add_generation(graph, ensure_toy_checkpoint().name, "pairs", text)
        server.run(graph)
        datasets = base / "datasets"
        for family, name in (("flux", "flux1-dev.safetensors"), ("sd20", "v2-1_768.safetensors")):
            folder = datasets / f"pairs_of_{family}"
            shutil.copytree(datasets / "pairs", folder)
            info = json.loads((folder / "dataset.json").read_text())
            info["base_checkpoint"] = {"name": name, "sha256": "0" * 64, "family": family}
            (folder / "dataset.json").write_text(json.dumps(info))
        yield server
        server.check_log()


@pytest.fixture(scope="module")
def frontend(server):
    with open_frontend(server.url) as frontend:
        yield frontend


def toasts(frontend: Frontend, name: str, containing: str) -> list[str]:
    """Wait for a toast with this text; return the texts of all there are."""
    toast = frontend.page.locator(TOASTS, has_text=containing)
    toast.first.wait_for(timeout=60_000)
    frontend.page.wait_for_timeout(700)  # its opening is animated
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        frontend.page.screenshot(path=Path(folder) / f"mistake_{name}.png", scale="css")
    return frontend.page.locator(TOASTS).all_inner_texts()


def prompts(**source) -> Graph:
    graph = Graph()
    pairs = graph.add("SafetyExpertsPromptPairs", **{"source__category": "hate", "source__first_seed": 0, **source})
    graph.add("PreviewAny", source=(pairs, 0))
    return graph


def native(vae: str | None = "the checkpoint's", is_compiled: bool = False, **inputs) -> Graph:
    """Return a training on the MODEL of a loader."""
    graph = Graph()
    loader = graphs.checkpoint_loader(graph, ensure_toy_checkpoint().name)
    links = {"model": (loader, 0), "clip": (loader, 1)}
    if is_compiled:
        links["model"] = (graph.add("TorchCompileModel", model=(loader, 0), backend="inductor"), 0)
    if vae:
        links["vae"] = (loader, 2) if vae == "the checkpoint's" else (graph.add("VAELoader", vae_name=vae), 0)
    return training(graph=graph, **links, **inputs)


def training(overrides: str = "steps=2", dataset: str = "pairs", graph: Graph | None = None, **inputs) -> Graph:
    graph = Graph() if graph is None else graph
    recipe = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=overrides)
    settings = {"checkpoint": "(the one that drew the dataset)", "category": "all", "recipe_name": "toy"}
    graph.add(
        "SafetyExpertsTrain",
        dataset=(graph.add("SafetyExpertsLoadDataset", dataset_name=dataset), 0),
        recipe=(recipe, 0),
        **{"expert_name": "mistake", "sample_every": 0, **settings, **inputs},
    )
    return graph


def recording(chosen_seed: int = 5, rejected_seed: int = 5, **inputs) -> Graph:
    checkpoint = ensure_toy_checkpoint().name
    graph = Graph()
    images = [
        graphs.add_image(graph, checkpoint, "a red circle", seed, save=False) for seed in (chosen_seed, rejected_seed)
    ]
    settings = {
        "prompt": "a red circle with thorns",
        "category": "violence",
        "seed": 0,
        "dataset_name": "recorded",
        "checkpoint": checkpoint,
    }
    graph.add("SafetyExpertsRecordPair", chosen=(images[0], 0), rejected=(images[1], 0), **{**settings, **inputs})
    return graph


def merging(weights: str) -> Graph:
    graph = Graph()
    merge = graph.add("SafetyExpertsMerge", method="linear", weights=weights)
    graph.add("SafetyExpertsSave", expert=(merge, 0), expert_name="merged")
    return graph


MISTAKES = {
    "empty_text": (lambda: prompts(source="text", source__text=""), "no prompt pairs in the text"),
    "no_bar": (lambda: prompts(source="text", source__text="a red circle"), "with one | between"),
    "yaml": (lambda: prompts(source="taxonomy", source__taxonomy="a: [b"), "taxonomy line 1: not valid YAML"),
    "leaves_its_folder": (lambda: training(expert_name="../../mine"), "leaves the folder"),
    "misspelt_option": (lambda: training(overrides="stepz=3"), "did you mean 'steps'?"),
    "absent_category": (lambda: training(category="hate"), "has no pairs of category 'hate' to train on"),
    "unnamed_category": (lambda: training(category="own …"), "category is not named"),
    "weights": (lambda: merging("one, two"), "give one number an expert"),
    "empty_prompt": (lambda: recording(prompt=" "), "prompt is empty"),
    "missing_vae": (lambda: native(vae=None), "vae is not connected: training on a MODEL needs its CLIP and VAE too"),
    "other_vae": (
        lambda: native(vae="taesd16.safetensors"),
        "the VAE gives 16 channels and this model draws in 4 (SD15)",
    ),
    "other_latents": (lambda: native(dataset="pairs_of_flux"), "(flux), whose latents are not those of"),
    "compiled": (
        lambda: native(is_compiled=True),
        "this MODEL is compiled (torch.compile), and adapters cannot be put",
    ),
    "two_seeds": (lambda: recording(rejected_seed=6), "drawn with seed 5 and rejected with seed 6"),
    # The last, as it trains then.
    "other_base": (
        lambda: native(dataset="pairs_of_sd20", overrides="steps=1"),
        "the dataset was drawn by v2-1_768.safetensors",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_its_sentence_once_without_a_click(frontend, name):
    graph, sentence = MISTAKES[name]
    frontend.open_api_graph(graph(), name)
    frontend.press_run()

    ours = [text for text in toasts(frontend, name, sentence) if sentence in text]

    assert len(ours) == 1
    assert "custom_nodes" not in ours[0] and "InputError" not in ours[0]


def test_a_gguf_file_without_its_pack_names_the_missing_node(frontend):
    graph = native()
    training = next(node for node in graph.values() if node["class_type"] == "SafetyExpertsTrain")
    training["inputs"]["model"] = [graph.add("UnetLoaderGGUF", unet_name="flux1-dev-Q8_0.gguf"), 0]

    frontend.open_api_graph(graph, "gguf")

    frontend.page.get_by_text("Missing node: UnetLoaderGGUF").wait_for(timeout=30_000)
    frontend.page.keyboard.press("Escape")


def test_a_native_training_cancelled_at_random_steps_says_what_is_saved(server, frontend):
    """CANCELS=10 tries ten of them (benchmarks/native_cancels.py holds what is resumed against the uninterrupted)."""
    steps = 40
    frontend.page.evaluate(
        "() => app.api.addEventListener('progress', ({detail}) => { window.shown = [detail.value, detail.max] })"
    )
    for number in range(int(os.environ.get("CANCELS", "2"))):
        at, name = random.Random(number).randrange(1, steps - 2), f"stopped_{number}"
        frontend.open_api_graph(
            native(overrides=f"steps={steps}\nbatch_size=1\naccumulation_steps=1", expert_name=name), name
        )
        frontend.page.evaluate("() => { window.shown = [0, 0] }")
        frontend.press_run()
        frontend.page.wait_for_function(f"() => shown[1] === {steps} && shown[0] >= {at}", timeout=240_000)
        frontend.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")

        text = next(text for text in toasts(frontend, name, f"{name}_00001_") if name in text)

        taken = int(re.search(rf"Stopped after (\d+) of {steps} steps", text).group(1))
        assert at <= taken < steps and "marked as unfinished" in text and "`resume` on to go on" in text
        assert (server.base_directory / "output" / "loras" / f"{name}_00001_.resume").is_file()


def test_a_finished_training_queued_again_is_given_back_with_a_message_on_the_screen(server, frontend):
    frontend.open_api_graph(training(expert_name="done"), "again")
    frontend.press_run()
    expert = server.base_directory / "output" / "loras" / "done_00001_.safetensors"
    deadline = time.monotonic() + 300
    while not expert.exists():
        assert time.monotonic() < deadline
        time.sleep(1)
    frontend.page.wait_for_timeout(3000)
    frontend.set_widget("SafetyExpertsTrain", sample_every=1)  # or ComfyUI's own cache answers
    frontend.press_run()

    (text,) = toasts(frontend, "again", "is this very training, finished")

    assert "done_00001_.safetensors" in text and "train_again" in text
    assert [path.name for path in expert.parent.glob("done_*.safetensors")] == [expert.name]


@pytest.mark.parametrize("name", ["1_build_preference_dataset", "2_train_expert", "3_merge_and_apply"])
def test_a_workflow_saved_by_the_first_version_opens_with_the_values_it_had(frontend, name):
    """The files are the example workflows as they were shipped then; a widget in between would move the values."""
    folder = Path(__file__).parent / "version_1"
    frontend.open_workflow(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), name)
    _, exported = frontend.export()

    for number, node in json.loads((folder / "api" / f"{name}.json").read_text(encoding="utf-8")).items():
        assert exported[number]["inputs"] | node["inputs"] == exported[number]["inputs"], node["class_type"]
