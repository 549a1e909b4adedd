"""The training panel in a real browser and a real ComfyUI, used while the toy checkpoint trains.

With SCREENSHOTS=<folder> pictures of it are kept.
"""

import os
import re
import time
from pathlib import Path

import graphs
import pytest
from frontend import open_frontend
from graphs import Graph
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.experts.expert_file import load_expert

STEPS = 400  # more than it takes: the panel stops it
OVERRIDES = (
    f"steps={STEPS}\nbatch_size=1\nanchor_weight=0\nsft_weight=0\nschedule=constant\nsave_steps=1000\nprecision=fp32\n"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        server.add_model(ensure_toy_checkpoint())
        text = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("red", "green", "blue"))
        graph = Graph()
        graphs.add_generation(graph, ensure_toy_checkpoint().name, "pairs", text)
        server.run(graph)
        yield server
        server.check_log()


@pytest.fixture(scope="module")
def frontend(server):
    with open_frontend(server.url) as frontend:
        yield frontend


def training() -> Graph:
    graph = Graph()
    recipe = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=OVERRIDES)
    dataset = graph.add("SafetyExpertsLoadDataset", dataset_name="pairs")
    node = graph.add(
        "SafetyExpertsTrain",
        dataset=(dataset, 0),
        recipe=(recipe, 0),
        checkpoint="(the one that drew the dataset)",
        category="all",
        recipe_name="toy",
        expert_name="watched",
        sample_every=3,
    )
    graph.add("SafetyExpertsCompare", before=(node, 4), after=(node, 5), unsafe_side="before")
    return graph


def keep(frontend, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        frontend.page.wait_for_timeout(700)
        frontend.page.screenshot(path=Path(folder) / f"{name}.png", scale="css")


def status(panel) -> str:
    return panel.locator(".status").inner_text()


def wait_for(panel, pattern: str) -> str:
    deadline = time.monotonic() + 120
    while not re.search(pattern, said := status(panel)):
        assert time.monotonic() < deadline, f"{pattern} was never said; at the end: {said}"
        time.sleep(0.3)
    return said


def test_the_panel_is_used_while_training_and_after_a_reload(server, frontend):
    page = frontend.page
    page.set_viewport_size({"width": 1366, "height": 768})
    frontend.open_api_graph(training(), "training")
    frontend.press_run()
    node = page.locator(".safety-run.node")
    wait_for(node, r"step [1-9]\d* of 400, \d+:\d\d left, .* GiB on cpu")
    keep(frontend, "training_node_dark_1366")

    page.reload()
    frontend.wait_until_ready()
    frontend.open_api_graph(training(), "training")
    said = wait_for(page.locator(".safety-run.node"), r"step \d+ of 400, .* left")
    assert int(re.search(r"step (\d+)", said)[1]) >= 1

    page.evaluate(
        "() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.safety-experts-training')"
    )
    panel = page.locator(".safety-run.panel")
    wait_for(panel, r"step \d+ of 400")
    page.get_by_text("Unsaved Workflow").first.click()  # another tab, without the node, and back
    page.wait_for_function("() => !app.graph._nodes.some(node => node.type === 'SafetyExpertsTrain')")
    wait_for(panel, r"step \d+ of 400")
    page.locator(".workflow-label", has_text="training").first.click()
    wait_for(page.locator(".safety-run.node"), r"step \d+ of 400, .* left")
    plot = panel.locator(".u-over").first
    plot.hover(position={"x": 20, "y": 10})
    assert re.search(r"step \d+: [\d.]+, smoothed [\d.]+", panel.locator("figcaption").first.inner_text())
    wait_for(panel, r"step ([3-9]|\d\d+) of 400")
    keep(frontend, "training_panel_dark_1366")
    panel.locator("input[type=range]").first.fill("0")  # smoothing
    value = re.search(r"([\d.e-]+), smoothed ([\d.e-]+)", panel.locator("figcaption").nth(1).inner_text())
    assert value[1] == value[2]
    page.set_viewport_size({"width": 1920, "height": 1080})
    page.evaluate("async () => app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.wait_for_function("() => document.querySelector('.safety-run.panel.light')")
    keep(frontend, "training_panel_light_1920")

    panel.locator("[data-request=save]").click()
    wait_for(panel, r"saved watched_00001_step_\d+\.safetensors")
    samples = panel.locator(".samples .unsafe img")
    assert samples.evaluate("image => getComputedStyle(image).filter").startswith("blur")
    panel.get_by_role("button", name="All steps").click()
    rows = panel.locator(".matrix tbody tr").count()
    assert rows >= 2  # before training, and step 3
    panel.locator("[data-request=sample]").click()
    page.wait_for_function(
        f"() => document.querySelectorAll('.panel .matrix tbody tr').length > {rows}", timeout=60_000
    )
    panel.locator("[data-request=stop]").click()
    wait_for(panel, r"^stopped, step \d+ of 400, took")

    loras = server.base_directory / "output" / "loras"
    expert = load_expert(loras / "watched_00001_.safetensors")
    assert not expert.info.trained.finished and expert.info.trained.step < STEPS
    (saved,) = loras.glob("watched_00001_step_*.safetensors")
    assert load_expert(saved).info.trained.step < expert.info.trained.step
    assert (loras / "watched_00001_.preview.png").is_file()
    # The graph went on with what was kept: Compare shows the samples.
    page.wait_for_function("() => document.querySelector('.safety-compare .before img')?.naturalWidth > 0")
