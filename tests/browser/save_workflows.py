"""Save example_workflows/*.json with the real frontend, from the graphs in example_workflows/api/ and `layouts.py`.

    python tests/browser/save_workflows.py [4_*]      (needs playwright and Chromium; `make workflows` does it)

Edit a graph in api/ and its groups and notes in `layouts.py`, run this, then `SCREENSHOTS=docs/screenshots make
test-browser` and look at the pictures. The daily one is saved as an app too, and as a subgraph blueprint.
"""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

from arranging import arrange
from frontend import Frontend, open_frontend
from layouts import LAYOUTS
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from thumbnails import save_thumbnail

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "example_workflows"
# Widgets that name a file; nothing is loaded, so empty files will do.
FILES = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "expert_name": "loras",
    "file": "safety_judges",
}


def main() -> None:
    """Save every workflow whose name fits the pattern."""
    sources = sorted((FOLDER / "api").glob(sys.argv[1] if len(sys.argv) > 1 else "*.json"))
    graphs = {source.stem: json.loads(source.read_text(encoding="utf-8")) for source in sources}
    with ComfyServer() as server:
        server.add_model(ensure_toy_checkpoint())
        for graph in graphs.values():
            add_files(server.base_directory / "models", graph)
        with open_frontend(server.url) as frontend:
            for name, graph in graphs.items():
                save(frontend, name, graph)


def add_files(models: Path, graph: dict[str, Any]) -> None:
    """Make empty files for those that a graph names."""
    for node in graph.values():
        for widget, value in node["inputs"].items():
            folder = FILES.get(widget)
            if widget == "clip_name":
                folder = "clip_vision" if node["class_type"] == "CLIPVisionLoader" else "text_encoders"
            if folder and isinstance(value, str) and value.endswith(".safetensors"):
                (models / folder).mkdir(parents=True, exist_ok=True)
                (models / folder / value).touch()


def save(frontend: Frontend, name: str, graph: dict[str, Any]) -> None:
    """Open a graph, arrange it, open it again as the frontend would, and write what that exports."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', project, re.MULTILINE).group(1)
    frontend.open_api_graph(graph, name)
    workflow, _ = frontend.export()
    arrange(workflow, LAYOUTS[name], version)
    frontend.open_workflow(workflow, name)
    saved, exported = frontend.export()
    for number, node in graph.items():
        if exported[number]["inputs"] != node["inputs"]:
            sys.exit(f"{name}, node {number} ({node['class_type']}): the frontend changed its inputs")
    write(FOLDER / f"{name}.json", saved)
    save_thumbnail(name, LAYOUTS[name], FOLDER / f"{name}.jpg")
    if name == "5_use_every_day":
        save_blueprint(frontend, saved, "Safe generation")
        app = copy.deepcopy(saved)
        app["extra"]["linearMode"] = True
        write(FOLDER / f"{name}.app.json", app)
        save_thumbnail(f"{name}.app", LAYOUTS[name], FOLDER / f"{name}.app.jpg")


# Everything but the loaders and the saving becomes one node.
_FOLD = """([outside, name]) => {
  const graph = app.graph;
  for (const node of [...graph._nodes]) if (node.type === 'MarkdownNote') graph.remove(node);
  for (const group of [...graph._groups]) graph.remove(group);
  for (const reroute of [...graph.reroutes.keys()]) graph.removeReroute(reroute);
  const inside = new Set(graph._nodes.filter(node => !outside.includes(node.type)));
  const { subgraph, node } = graph.convertToSubgraph(inside);
  subgraph.name = node.title = name;
}"""


def save_blueprint(frontend: Frontend, workflow: dict[str, Any], name: str) -> None:
    """Write the daily workflow as one node, with its prompt and sliders on it, for ComfyUI's node library."""
    frontend.open_workflow(workflow, name)
    frontend.page.evaluate(_FOLD, [["CheckpointLoaderSimple", "SaveImage"], name])
    folded, _ = frontend.export()
    (subgraph,) = folded["definitions"]["subgraphs"]
    (node,) = [node for node in folded["nodes"] if node["type"] == subgraph["id"]]
    subgraph |= {
        "category": "safety experts",
        "description": "A model, a safety expert with one strength per category, a prompt: a picture.",
    }
    for entry in subgraph["inputs"]:
        entry["label"] = {"text": "prompt", "text_1": "negative prompt"}.get(entry["name"], entry["name"])
    inside = {inner["type"]: str(inner["id"]) for inner in subgraph["nodes"]}
    shown = [(inside["SafetyExpertsLoad"], "expert_name")]
    shown += [(inside["SafetyExpertsApply"], widget) for _, widget in LAYOUTS["5_use_every_day"].sliders[1:]]
    shown += [(inside["EmptyLatentImage"], widget) for widget in ("width", "height")]
    shown += [(inside["KSampler"], widget) for widget in ("steps", "cfg")]
    known = [tuple(pair) for pair in node.setdefault("properties", {}).get("proxyWidgets", [])]
    node["properties"]["proxyWidgets"] = [list(pair) for pair in [*shown, *(p for p in known if p not in shown)]]
    node["properties"] |= {"cnr_id": "safety-experts"}
    for slot in (*node["inputs"], *node["outputs"]):
        slot |= {"link": None} if "link" in slot else {"links": []}
    node |= {"pos": [0, 0], "size": [420, 560], "widgets_values": []}  # the nodes inside hold the values
    blueprint = {"revision": 0, "last_node_id": folded["last_node_id"], "last_link_id": folded["last_link_id"]}
    blueprint |= {"nodes": [node], "links": [], "version": 0.4, "definitions": folded["definitions"], "extra": {}}
    write(ROOT / "subgraphs" / f"{name}.json", blueprint)


def write(path: Path, workflow: dict[str, Any]) -> None:
    path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
