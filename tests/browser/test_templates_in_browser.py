"""The pack as a new user meets it, on two screens and in both themes: templates, opened in ComfyUI's own browser and,
where the toy checkpoint can, run to their end; help pages; cards.

With SCREENSHOTS=<folder> pictures are kept.
"""

import json
import os
import time
import urllib.request
from pathlib import Path

import graphs
import pytest
from frontend import Frontend, open_frontend
from graphs import Graph
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.name.removesuffix(".json") for path in (ROOT / "example_workflows").glob("*.json"))
SCREENS = {"dark": (1366, 768), "light": (1920, 1080)}
TOY = "0_make_my_model_safer_toy"

# What the canvas shows of a workflow; a node's box has its title bar, above its position.
_LOOK = """() => app.graph._nodes.map(node => {
  const [x, y, width, height] = node.getBounding();
  return {type: node.type, isKnown: node.type in LiteGraph.registered_node_types && !node.has_errors,
          box: [x, y, x + width, y + height]};
})"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        checkpoint = server.add_model(ensure_toy_checkpoint())
        graph = Graph()
        text = "a red circle with thorns | a red circle\na blue square with thorns | a blue square"
        guard = graph.add(
            "SafetyExpertsTrainPromptGuard",
            clip=(graphs.checkpoint_loader(graph, checkpoint), 1),
            prompt_pairs=(graphs.add_pairs(graph, text), 0),
            name="toy_guard",
            false_positive_rate=0.0,
            steps=12,
            seed=0,
            leave_out=False,
        )
        graph.add("PreviewAny", source=(guard, 2))
        server.run(graph)
        yield server
        server.check_log()


@pytest.fixture(scope="module", params=SCREENS)
def frontend(server, request):
    width, height = SCREENS[request.param]
    with open_frontend(server.url) as frontend:
        frontend.page.set_viewport_size({"width": width, "height": height})
        frontend.theme = request.param
        frontend.page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", frontend.theme)
        yield frontend


def keep(frontend: Frontend, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        frontend.page.wait_for_timeout(1000)
        frontend.page.screenshot(path=Path(folder) / f"{name}_{frontend.theme}.png", scale="css")


def open_template(frontend: Frontend, name: str) -> None:
    """Open ComfyUI's template browser, the pack's page in it, and a template, by clicks."""
    page = frontend.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("safety-experts", exact=True).click()
    card = page.get_by_test_id(f"template-workflow-{name}")
    card.scroll_into_view_if_needed()
    card.click()
    expected = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.wait_for_function("number => app.graph._nodes.length === number", arg=len(expected["nodes"]))
    page.wait_for_timeout(1500)


def wait_until_done(server: ComfyServer, frontend: Frontend, seconds: int = 1500) -> dict:
    """Press Run; return the new history entry when it has succeeded."""

    def history() -> dict:
        with urllib.request.urlopen(f"{server.url}/history") as answer:
            return json.loads(answer.read())

    before = set(history())
    frontend.press_run()
    deadline = time.monotonic() + seconds
    while not (new := set(history()) - before):
        assert time.monotonic() < deadline, "it did not finish"
        time.sleep(1)
    entry = history()[new.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    frontend.page.wait_for_timeout(2000)  # pictures arrive after the last message
    return entry


def overlaps(first: list[float], second: list[float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


@pytest.mark.parametrize("name", NAMES)
def test_a_template_opens_with_every_node_and_none_over_another(frontend, name):
    open_template(frontend, name)

    shown = frontend.page.evaluate(_LOOK)
    keep(frontend, f"template_{name}")

    assert [node["type"] for node in shown if not node["isKnown"]] == []
    assert [
        (one["type"], other["type"])
        for number, one in enumerate(shown)
        for other in shown[:number]
        if overlaps(one["box"], other["box"])
    ] == []


def test_the_template_browser_shows_every_template_with_its_picture(frontend):
    page = frontend.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("safety-experts", exact=True).click()
    for name in NAMES:
        picture = page.get_by_test_id(f"template-workflow-{name}").locator("img").first
        picture.scroll_into_view_if_needed()
        page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    keep(frontend, "template_browser")
    page.keyboard.press("Escape")
