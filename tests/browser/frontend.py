"""Drive ComfyUI's real frontend in a real Chromium (Playwright, `CHROMIUM` or /usr/bin/chromium)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

# Nodes as wide and high as they need; seeds stay as they are from run to run.
_PREPARE = """() => {
  for (const node of app.graph._nodes) {
    const [width, height] = node.computeSize();
    node.setSize([width, height]);
    for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
  }
}"""


class Frontend:
    """One browser page with ComfyUI open."""

    def __init__(self, page: Page, url: str):
        self.page = page
        page.goto(url)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the page has loaded, and close the templates dialog of a first visit."""
        self.page.wait_for_function("() => window.app?.extensionManager && window.app.graph", timeout=120_000)
        self.page.wait_for_timeout(3000)  # the dialog opens late
        self.page.keyboard.press("Escape")
        self.page.wait_for_timeout(500)

    def open_api_graph(self, graph: dict[str, Any], name: str) -> None:
        """Turn a graph in API format into nodes of their least size."""
        self.page.evaluate("async ([graph, name]) => app.loadApiJson(graph, name)", [graph, name])
        self.page.wait_for_timeout(1000)
        self.page.evaluate(_PREPARE)

    def open_workflow(self, workflow: dict[str, Any], name: str) -> None:
        """Open a saved workflow, as dropping its file on the canvas does."""
        self.page.evaluate("async ([flow, name]) => app.loadGraphData(flow, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(1000)

    def export(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (workflow as saved, graph in API format) of what is open."""
        result = self.page.evaluate(
            "async () => { const {workflow, output} = await app.graphToPrompt(); return [workflow, output] }"
        )
        return result[0], result[1]

    def set_widget(self, node_type: str, **values: Any) -> None:
        """Type values into the widgets of the first node of a type."""
        found = self.page.evaluate(
            """([type, values]) => {
              const node = app.graph._nodes.find(node => node.type === type);
              const widgets = node.widgets.filter(widget => widget.name in values);
              for (const widget of widgets) { widget.value = values[widget.name]; widget.callback?.(widget.value); }
              return widgets.length;
            }""",
            [node_type, values],
        )
        assert found == len(values), f"{node_type} has only {found} of the widgets {list(values)}"

    def press_run(self) -> None:
        """Click the Run button."""
        self.page.get_by_test_id("queue-button").click()

    def screenshot(self, path: Path) -> None:
        """Show the whole graph and take its picture."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(1500)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)


@contextlib.contextmanager
def open_frontend(url: str) -> Iterator[Frontend]:
    """Start Chromium, open ComfyUI at `url`, close it at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
        )
        try:
            yield Frontend(browser.new_page(viewport={"width": 2100, "height": 1180}), url)
        finally:
            browser.close()
