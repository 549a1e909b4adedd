"""Lay out a saved workflow (ComfyUI's format 0.4) by its `Layout`: groups, notes, colours, and wires in a channel.

Two rows of groups stand above and below a channel. A wire that goes to the next column is left alone; every other one
leaves its column by the gap on the right, runs in a lane of the channel that belongs to its output, and enters the gap
on the left of where it goes, so that no wire runs beneath a node. Sizes are pixels at 100 %.
"""

from collections.abc import Iterator
from typing import Any

from layouts import COLOURS, Group, Layout

TITLE, SLOT = 30, 20  # of a node's title bar; from one socket to the next
GAP, ROW_GAP, MARGIN, HEAD = 120, 50, 30, 60
LANE = 18
PICTURE = (320, 340)
SIZES = {
    "PreviewImage": PICTURE, "SaveImage": (360, 400), "LossGraphNode": PICTURE, "SafetyExpertsCompare": (360, 420),
    "PreviewAny": (420, 300), "SafetyExpertsEvaluate": (420, 0), "SafetyExpertsLoad": (320, 200),
}  # fmt: skip
# Show pictures below their widgets while they run.
LIVE_PICTURE = {"SafetyExpertsGeneratePairs": 260, "SafetyExpertsTrain": 330, "SafetyExpertsEvaluate": 260}
TEXT_HEIGHT = {"SafetyExpertsPromptPairs": 420, "SafetyExpertsWritePairs": 420, "CLIPTextEncode": 130}
NOTE_WIDTH = 300

Json = dict[str, Any]


def arrange(workflow: Json, layout: Layout, version: str) -> None:
    """Place everything of a workflow, in place; `version` is the pack's."""
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in ("MarkdownNote", "Reroute")}
    workflow["nodes"] = list(nodes.values())
    workflow["groups"] = []
    for node in nodes.values():
        _set_size(node)
        _name_origin(node, layout, version)
    lanes = _long_links(workflow, nodes, layout)
    channel = len({link[1:3] for link in lanes}) * LANE + 2 * 40
    above = max((_height(group, nodes) for group in layout.above), default=0)
    next_id = 100
    for row, top in ((layout.above, 0), (layout.below, above + channel)):
        x = 0.0
        for number, group in enumerate(row):
            height = _height(group, nodes)
            y = top + (above - height if row is layout.above else 0)  # both rows stand on the channel
            width = _place(group, nodes, x, y)
            note_height = _note_height(group.note, max(width, NOTE_WIDTH))
            note_y = y - note_height - 50 if row is layout.above else y + height + 50
            note = _note(next_id, group, x, note_y, max(width, NOTE_WIDTH), note_height)
            next_id += 1
            workflow["nodes"].append(note)
            workflow["groups"].append(
                _group(number + 1 + (100 if row is layout.below else 0), group, x, y, width, height)
            )
            x += max(width, NOTE_WIDTH) + GAP
    workflow["last_node_id"] = next_id
    _route(workflow, nodes, lanes, above + 40)
    extra = workflow.setdefault("extra", {})
    extra["ds"] = {"scale": 0.6, "offset": [60, 400]}
    extra.pop("linearData", None)
    if layout.sliders:
        extra["linearData"] = {
            "inputs": [[str(node), widget] for node, widget in layout.sliders],
            "outputs": [str(node) for node in layout.shown],
        }


def _set_size(node: Json) -> None:
    width, height = node["size"]
    least = SIZES.get(node["type"], (320, 0))
    has_text = TEXT_HEIGHT.get(node["type"], 0)
    height = max(height + LIVE_PICTURE.get(node["type"], 0), least[1], has_text)
    node["size"] = [max(round(width), least[0], 420 if has_text > 200 else 0), round(height)]


def _name_origin(node: Json, layout: Layout, version: str) -> None:
    """Say which pack a node is of, for the dialog of missing nodes, and where its public models are."""
    properties = node.setdefault("properties", {})
    ours = node["type"].startswith("SafetyExperts")
    properties["cnr_id"] = "safety-experts" if ours else "comfy-core"
    properties["ver"] = version if ours else "0.30.0"
    if models := layout.models.get(node["id"]):
        properties["models"] = list(models)


def _columns(layout: Layout) -> Iterator[tuple[int, int, Group, int]]:
    """Yield (node, column across the row, its group, row)."""
    for row, groups in enumerate((layout.above, layout.below)):
        column = 0
        for group in groups:
            for numbers in group.columns:
                for number in numbers:
                    yield number, column, group, row
                column += 1


def _long_links(workflow: Json, nodes: dict[int, Json], layout: Layout) -> list[tuple]:
    """Return the links that do not go to the next column, as (link, from, slot, to, slot)."""
    where = {node: (column, row) for node, column, _, row in _columns(layout)}
    if missing := set(nodes) ^ set(where):
        raise ValueError(f"the layout and the workflow differ in nodes {sorted(missing)}")
    found = []
    for link, source, slot, target, entry, _ in workflow["links"]:
        if where[target] != (where[source][0] + 1, where[source][1]):
            found.append((link, source, slot, target, entry))
    return found


def _height(group: Group, nodes: dict[int, Json]) -> float:
    columns = [
        sum(nodes[n]["size"][1] + TITLE for n in numbers) + ROW_GAP * (len(numbers) - 1) for numbers in group.columns
    ]
    return max(columns) + HEAD + MARGIN


def _place(group: Group, nodes: dict[int, Json], x: float, y: float) -> float:
    """Place a group's nodes; return its width."""
    left = x + MARGIN
    _, title, body = COLOURS[group.step]
    for numbers in group.columns:
        top = y + HEAD + TITLE
        for number in numbers:
            nodes[number]["pos"] = [left, top]
            nodes[number] |= {"color": title, "bgcolor": body}
            top += nodes[number]["size"][1] + TITLE + ROW_GAP
        left += max(nodes[number]["size"][0] for number in numbers) + GAP
    return left - GAP + MARGIN - x


def _group(number: int, group: Group, x: float, y: float, width: float, height: float) -> Json:
    colour = COLOURS[group.step][0]
    return {
        "id": number,
        "title": group.title,
        "bounding": [x, y, width, height],
        "color": colour,
        "font_size": 32,
        "flags": {},
    }


def _note_height(text: str, width: float) -> int:
    lines = sum(1 + int(len(part) * 7.6 / (width - 30)) for part in text.split("\n"))
    return 40 + 22 * lines


def _note(number: int, group: Group, x: float, y: float, width: float, height: float) -> Json:
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [x, y],
        "size": [width, height],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": group.title,
        "properties": {},
        "widgets_values": [group.note],
        "color": "#222",
        "bgcolor": "#000",
    }


def _entry(node: Json, slot: int, key: str) -> tuple[float, float]:
    """Return where a socket is, in the canvas; those of widgets come after the others."""
    if key == "outputs":
        return node["pos"][0] + node["size"][0], node["pos"][1] + (slot + 0.7) * SLOT
    plain = [number for number, entry in enumerate(node["inputs"]) if "widget" not in entry]
    place = plain.index(slot) if slot in plain else len(plain)
    return node["pos"][0], node["pos"][1] + (place + 0.7) * SLOT


def _route(workflow: Json, nodes: dict[int, Json], lanes: list[tuple], first: float) -> None:
    """Give every long link its points: out of the gap on the right, along its lane, into the gap on the left."""
    outputs = sorted(
        {(source, slot) for _, source, slot, _, _ in lanes}, key=lambda item: (nodes[item[0]]["pos"], item[1])
    )
    points: list[Json] = []
    parents: dict[int, int] = {}
    known: dict[tuple, int] = {}

    def point(x: float, y: float, parent: int | None, link: int) -> int:
        key = (round(x), round(y), parent)
        if key not in known:
            known[key] = len(points) + 1
            points.append({"id": known[key], "pos": [round(x), round(y)], "linkIds": []})
            if parent is not None:
                points[-1]["parentId"] = parent
        points[known[key] - 1]["linkIds"].append(link)
        return known[key]

    for link, source, slot, target, entry in lanes:
        lane = outputs.index((source, slot))
        shift = 14 + 12 * (lane % 8)
        y = first + lane * LANE
        x_out, y_out = _entry(nodes[source], slot, "outputs")
        x_in, y_in = _entry(nodes[target], entry, "inputs")
        right = max(x_out, _right_of_column(nodes, nodes[source]))
        last = point(right + shift, y_out, None, link)
        last = point(right + shift, y, last, link)
        last = point(x_in - GAP + shift, y, last, link)
        parents[link] = point(x_in - GAP + shift, y_in, last, link)
    extra = workflow.setdefault("extra", {})
    extra["reroutes"] = points
    extra["linkExtensions"] = [{"id": link, "parentId": parent} for link, parent in parents.items()]


def _right_of_column(nodes: dict[int, Json], node: Json) -> float:
    return max(other["pos"][0] + other["size"][0] for other in nodes.values() if other["pos"][0] == node["pos"][0])
