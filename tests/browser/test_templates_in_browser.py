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
  return {type: node.type, isKnown: node.type in LiteGraph.registered_node_types,
          box: [x, y, x + width, y + height]};
})"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfyui")) as server:
        server.add_model(ensure_toy_checkpoint())
        yield server
        server.check_log()


@pytest.fixture(scope="module")
def made(server) -> dict[str, str]:
    """Names of an expert and of a prompt guard, both barely trained."""
    checkpoint = ensure_toy_checkpoint().name
    colours = ("blue", "green", "pink", "cyan", "yellow")
    lines = [f"a {colour} {shape}" for colour in colours for shape in ("circle", "square")]
    text = "\n".join(f"{line} with thorns | {line}" for line in lines)
    graph = Graph()
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
    drawn = graphs.add_generation(graph, checkpoint, "pairs", "\n".join(text.splitlines()[:2]))
    expert = graph.add(
        "SafetyExpertsTrain",
        dataset=(drawn, 0),
        recipe=(graph.add("SafetyExpertsRecipe", recipe="toy", overrides="steps=2\nbatch_size=2"), 0),
        checkpoint="(the one that drew the dataset)",
        category="all",
        recipe_name="toy",
        expert_name="toy_safer",
        sample_every=1,
    )
    shown = {"expert": graph.add("PreviewAny", source=(expert, 2)), "guard": graph.add("PreviewAny", source=(guard, 2))}
    before = set(history(server))
    server.queue(graph)
    outputs = wait_for(server, before)["outputs"]
    return {name: outputs[node]["text"][0] for name, node in shown.items()}


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


def history(server: ComfyServer) -> dict:
    with urllib.request.urlopen(f"{server.url}/history") as answer:
        return json.loads(answer.read())


def wait_for(server: ComfyServer, before: set[str], seconds: int = 1500) -> dict:
    """Return the history entry that was not there before, when it has succeeded."""
    deadline = time.monotonic() + seconds
    while not (new := set(now := history(server)) - before):
        assert time.monotonic() < deadline, "it did not finish"
        time.sleep(1)
    entry = now[new.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def run(server: ComfyServer, frontend: Frontend, seconds: int = 1500) -> dict:
    """Press Run; return the history entry."""
    before = set(history(server))
    frontend.press_run()
    entry = wait_for(server, before, seconds)
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


@pytest.mark.parametrize("frontend", ["dark"], indirect=True)
def test_what_is_missing_is_said_of_the_workflow_on_the_screen_only(frontend):
    said = frontend.page.locator(".p-toast-message", has_text="is not here")
    open_template(frontend, "3_merge_and_apply")
    assert "violence_00001_.safetensors" in said.first.inner_text()
    open_template(frontend, "2_train_expert")
    said.filter(has_text="toy_pairs").wait_for()
    assert said.filter(has_text="violence_00001_").count() == 0


def test_the_template_browser_shows_every_template_with_its_picture(frontend):
    page = frontend.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("safety-experts", exact=True).click()
    for name in NAMES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        picture = card.locator("img").first
        page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    keep(frontend, "template_browser")
    page.keyboard.press("Escape")


@pytest.mark.parametrize("frontend", ["dark"], indirect=True)
@pytest.mark.parametrize("name", ["5_use_every_day", "6_safe_generation"])
def test_a_daily_template_runs_on_the_toy_checkpoint(server, frontend, made, name):
    open_template(frontend, name)
    frontend.set_widget("CheckpointLoaderSimple", ckpt_name=ensure_toy_checkpoint().name)
    frontend.set_widget("SafetyExpertsLoad", expert_name=made["expert"])
    frontend.set_widget("EmptyLatentImage", width=64, height=64)
    if name == "6_safe_generation":
        frontend.set_widget("SafetyExpertsCheckPrompt", file=made["guard"])
        # The verifier needs CLIP ViT-L/14: no file of it is here.
        frontend.page.evaluate("""() => {
          const group = app.graph._groups.find(group => group.title.startsWith('5 '));
          group.recomputeInsideNodes();
          for (const node of group.nodes) if (node.type !== 'SaveImage') node.mode = 2;
        }""")

    entry = run(server, frontend)
    keep(frontend, f"ran_{name}")

    assert [image for output in entry["outputs"].values() for image in output.get("images", [])]


@pytest.mark.parametrize("frontend", ["dark"], indirect=True)
def test_the_toy_template_goes_from_three_words_to_a_report(server, frontend):
    open_template(frontend, TOY)

    entry = run(server, frontend, seconds=3000)
    keep(frontend, f"ran_{TOY}")

    said = "".join(text for output in entry["outputs"].values() for text in output.get("text", []))
    assert "%" in said
    assert (server.base_directory / "output" / "loras" / "toy_safer_00001_.preview.png").exists()


def test_the_card_is_opened_from_the_side_bar(frontend, made):
    page = frontend.page
    page.get_by_role("button", name="Safety experts: the cards").click()
    cards = page.frame_locator("iframe[title='Safety experts']")
    cards.get_by_text(made["expert"].removesuffix(".safetensors")).first.click()
    cards.get_by_text("SHA-256", exact=True).wait_for()
    keep(frontend, "card")
    page.get_by_role("button", name="Safety experts: the cards").click()


@pytest.mark.parametrize("frontend", ["dark"], indirect=True)
def test_every_node_has_its_help_beside_it(server, frontend):
    page = frontend.page
    nodes = {name: about["display_name"] for name, about in server.object_info().items() if "SafetyExperts" in name}
    frontend.open_workflow({"nodes": [], "links": [], "groups": [], "extra": {}, "version": 0.4}, "help")
    for number, (name, title) in enumerate(nodes.items()):
        page.evaluate(
            """type => {
              app.graph.clear();
              const node = LiteGraph.createNode(type);
              node.pos = [100, 200];
              app.graph.add(node);
              app.canvas.ds.scale = 0.6;
              app.canvas.ds.offset = [300, 100];
              app.canvas.selectNode(node);
            }""",
            name,
        )
        if number == 0:
            page.get_by_test_id("info-button").click()
        page.locator(".node-help-content h1", has_text=title).first.wait_for()
        picture = page.locator(".node-help-content img").first
        page.wait_for_function("image => image.naturalWidth > 0", arg=picture.element_handle())
    keep(frontend, "help")
