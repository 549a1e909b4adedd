"""Save web/docs/<node id>.png, the pictures of the help pages: each node as ComfyUI draws it, with its defaults.

python tests/browser/save_help_pictures.py [SafetyExpertsTrain …]      (needs playwright and Chromium)
"""

import io
import sys
from pathlib import Path

from frontend import open_frontend
from PIL import Image
from safety_experts.demo.comfyui import ComfyServer

FOLDER = Path(__file__).resolve().parents[2] / "web" / "docs"
NUM_COLOURS = 48
MARGIN_PX, TITLE_PX = 12, 30
LEFT_PX, TOP_PX = 260, 120

_ADD = """([type, left, top]) => {
  app.graph.clear();
  const node = LiteGraph.createNode(type);
  app.graph.add(node);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 340), Math.max(height, type === 'SafetyExpertsTrain' ? node.size[1] : 0)]);
  node.pos = [left, top];
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [0, 0];
  app.canvas.draw(true, true);
}"""
_BOX = """() => {
  const [x, y] = [app.canvas.canvas.getBoundingClientRect().x, app.canvas.canvas.getBoundingClientRect().y];
  const node = app.graph._nodes[0];
  return [x, y, node.size[0], node.size[1]];
}"""


def main() -> None:
    """Save the pictures of the nodes that are named, or of all."""
    with ComfyServer() as server, open_frontend(server.url) as frontend:
        page = frontend.page
        page.set_viewport_size({"width": 1600, "height": 1300})
        frontend.open_workflow({"nodes": [], "links": [], "groups": [], "extra": {}, "version": 0.4}, "pictures")
        for name in sys.argv[1:] or [path.stem for path in FOLDER.glob("*.md")]:
            page.evaluate(_ADD, [name, LEFT_PX, TOP_PX])
            page.wait_for_timeout(1000)  # widgets with a page of their own come later
            x, y, width, height = page.evaluate(_BOX)
            clip = {
                "x": x + LEFT_PX - MARGIN_PX,
                "y": y + TOP_PX - TITLE_PX - MARGIN_PX,
                "width": width + 2 * MARGIN_PX,
                "height": height + TITLE_PX + 2 * MARGIN_PX,
            }
            with Image.open(io.BytesIO(page.screenshot(clip=clip))) as picture:
                picture.convert("RGB").quantize(NUM_COLOURS).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
