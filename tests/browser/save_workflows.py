"""Save example_workflows/*.json with the real frontend, from the graphs in example_workflows/api/.

    python tests/browser/save_workflows.py [4_*]      (needs playwright and Chromium; `make workflows` does it)

Edit a graph in api/, run this, then `SCREENSHOTS=docs/screenshots make test-browser`, look at the pictures, and run
this again: each picture, made small, is what ComfyUI's template browser shows for its workflow.
"""

import json
import sys
from pathlib import Path

from frontend import open_frontend
from PIL import Image
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# Files that workflow 4 names, as core's template for Z-Image does; nothing is loaded, so empty ones will do.
NAMED = {"diffusion_models": "z_image_bf16", "text_encoders": "qwen_3_4b", "vae": "ae"}


def main() -> None:
    folder = ROOT / "example_workflows"
    with ComfyServer() as server:
        server.add_model(ensure_toy_checkpoint())
        for kind, name in NAMED.items():
            path = server.base_directory / "models" / kind / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        with open_frontend(server.url) as frontend:
            for source in sorted((folder / "api").glob(sys.argv[1] if len(sys.argv) > 1 else "*.json")):
                graph = json.loads(source.read_text(encoding="utf-8"))
                frontend.open_api_graph(graph, source.stem)
                workflow, exported = frontend.export()
                for number, node in graph.items():
                    if exported[number]["inputs"] != node["inputs"]:
                        sys.exit(
                            f"{source.name}, node {number} ({node['class_type']}): the frontend changed its inputs"
                        )
                text = json.dumps(workflow, indent=2, ensure_ascii=False)
                (folder / source.name).write_text(text + "\n", encoding="utf-8")
                save_thumbnail(ROOT / "docs" / "screenshots" / f"{source.stem}.png", folder / f"{source.stem}.jpg")


def save_thumbnail(screenshot: Path, thumbnail: Path) -> None:
    """Write the canvas of a screenshot, without the bars above and beside it."""
    with Image.open(screenshot) as page:
        canvas = page.convert("RGB").crop((60, 40, page.width, page.height))
    canvas.thumbnail((800, 450))
    canvas.save(thumbnail, quality=85)


if __name__ == "__main__":
    main()
