"""Example workflows can be read: no overlaps, nodes in groups, a note beside each, no wire beneath a node."""

import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TITLE = 30  # pixels of a node's title bar, above its position

Box = tuple[float, float, float, float]  # left, top, right, bottom


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def box_of(node: dict) -> Box:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def group_box(group: dict) -> Box:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def holds(outer: Box, inner: Box) -> bool:
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def distance(first: Box, second: Box) -> float:
    across = max(first[0] - second[2], second[0] - first[2], 0)
    down = max(first[1] - second[3], second[1] - first[3], 0)
    return max(across, down)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request) -> dict:
    return read(request.param)


def steps(workflow: dict) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]


def notes(workflow: dict) -> list[dict]:
    return [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]


def test_no_two_nodes_or_groups_overlap(workflow):
    for first, second in itertools.combinations(workflow["nodes"], 2):
        assert not overlap(box_of(first), box_of(second)), (
            f"{first['id']} {first['type']}, {second['id']} {second['type']}"
        )
    for first, second in itertools.combinations(workflow["groups"], 2):
        assert not overlap(group_box(first), group_box(second)), f"{first['title']}, {second['title']}"


def test_every_node_is_in_one_group_and_has_its_colour(workflow):
    colours: dict[str, set] = {}
    for node in steps(workflow):
        inside = [group for group in workflow["groups"] if holds(group_box(group), box_of(node))]
        assert len(inside) == 1, f"{node['id']} {node['type']} is in {[group['title'] for group in inside]}"
        colours.setdefault(inside[0]["color"], set()).add(node["bgcolor"])
    assert all(len(of_nodes) == 1 for of_nodes in colours.values())


def test_groups_are_numbered_as_the_steps_and_each_has_a_note_beside_it(workflow):
    numbers = [int(re.match(r"(\d+) ", group["title"]).group(1)) for group in workflow["groups"]]
    assert numbers == list(range(1, len(numbers) + 1))
    for group in workflow["groups"]:
        beside = [note for note in notes(workflow) if distance(group_box(group), box_of(note)) <= 100]
        assert [note for note in beside if note["title"] == group["title"] and len(note["widgets_values"][0]) > 10]


def test_no_wire_runs_beneath_a_node(workflow):
    """Along its re-routes; a wire without any goes to the next column, through a gap where nothing stands."""
    boxes = {node["id"]: box_of(node) for node in workflow["nodes"]}
    points = {point["id"]: point for point in workflow["extra"].get("reroutes") or []}
    ends = {entry["id"]: entry["parentId"] for entry in workflow["extra"].get("linkExtensions") or []}
    for link, source, _, target, _, _ in workflow["links"]:
        path, point = [], ends.get(link)
        while point is not None:
            path.insert(0, tuple(points[point]["pos"]))
            point = points[point].get("parentId")
        if path:
            _check_turns(link, path, source, boxes)
        else:
            gap = (boxes[source][2], boxes[target][0])
            assert gap[0] < gap[1], f"link {link} from {source} to {target} goes back"
            between = [node for node, box in boxes.items() if box[0] < gap[1] and box[2] > gap[0]]
            heights = boxes[source][1::2] + boxes[target][1::2]
            reach = (gap[0], min(heights), gap[1], max(heights))
            under = [node for node in between if node not in (source, target) and overlap(boxes[node], reach)]
            assert not [node for node in under if boxes[node][2] > gap[0] + 40 and boxes[node][0] < gap[1] - 40], link


def _check_turns(link: int, path: list[tuple[float, float]], source: int, boxes: dict[int, Box]) -> None:
    for (x1, y1), (x2, y2) in itertools.pairwise(path):
        assert x1 == x2 or y1 == y2, f"link {link} runs aslant"
        line = (min(x1, x2) - 0.5, min(y1, y2) - 0.5, max(x1, x2) + 0.5, max(y1, y2) + 0.5)
        assert not [node for node, box in boxes.items() if overlap(box, line)], f"link {link} from {source}"


def test_nodes_say_which_pack_they_are_of(workflow):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for node in steps(workflow):
        ours = node["type"].startswith("SafetyExperts")
        assert node["properties"]["cnr_id"] == ("safety-experts" if ours else "comfy-core")
        assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])
        assert not ours or f'version = "{node["properties"]["ver"]}"' in project


def test_public_models_can_be_downloaded_by_the_dialog(workflow):
    """As ComfyUI's dialog takes them: its hosts, its endings, the folder, and the very name that a widget holds."""
    for node in steps(workflow):
        for model in node["properties"].get("models", []):
            assert re.match(r"https://(huggingface\.co|civitai\.com)/", model["url"])
            assert model["url"].endswith((".safetensors", ".sft", ".ckpt")) and model["directory"]
            assert model["name"] in node["widgets_values"]
        names = [value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")]
        loader = node["properties"]["cnr_id"] == "comfy-core" and names and "toy" not in names[0]
        assert not loader or node["properties"].get("models"), f"{node['type']} {names}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_workflow_has_a_number_and_a_picture(path):
    assert re.match(r"\d_", path.name)
    assert path.with_suffix(".jpg").stat().st_size < 100_000


def test_the_app_is_its_workflow_with_sliders_and_a_prompt_alone():
    app, plain = (read(ROOT / "example_workflows" / f"5_use_every_day{end}") for end in (".app.json", ".json"))
    shown = app["extra"]["linearData"]
    widgets = {str(node["id"]): node for node in app["nodes"]}
    kinds = {widgets[node]["type"] for node, _ in shown["inputs"]}
    assert app["extra"]["linearMode"] is True and kinds == {"CLIPTextEncode", "SafetyExpertsApply"}
    assert [widgets[node]["type"] for node in shown["outputs"]] == ["SaveImage"]
    assert [node["type"] for node in app["nodes"]] == [node["type"] for node in plain["nodes"]]


def test_the_blueprint_is_the_daily_workflow_as_one_node():
    (path,) = (ROOT / "subgraphs").glob("*.json")
    blueprint = read(path)
    (node,), (subgraph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    inside = {inner["id"]: inner["type"] for inner in subgraph["nodes"]}
    daily = {node["type"] for node in steps(read(ROOT / "example_workflows" / "5_use_every_day.json"))}
    assert node["type"] == subgraph["id"] and set(inside.values()) == daily - {"CheckpointLoaderSimple", "SaveImage"}
    assert [entry["type"] for entry in subgraph["inputs"]][:3] == ["MODEL", "CLIP", "VAE"]
    shown = {(inside[int(number)], widget) for number, widget in node["properties"]["proxyWidgets"]}
    assert {("SafetyExpertsLoad", "expert_name"), ("SafetyExpertsApply", "violence")} <= shown
