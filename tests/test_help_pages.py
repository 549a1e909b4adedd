"""Every node has a help page; its tables explain every option (`python tests/test_help_pages.py` rewrites them)."""

import re
from pathlib import Path

import pytest
from safety_experts.experts.merging import METHODS
from safety_experts.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
ROWS = {
    "SafetyExpertsMerge": [
        f"| `{name}` | [{method.title}]({method.paper_url}) | {method.summary} |" for name, method in METHODS.items()
    ],
    "SafetyExpertsRecipe": [f"| `{name}` | {field.description} |" for name, field in Recipe.model_fields.items()],
}


def test_every_node_has_a_help_page_and_every_page_a_node():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    node_ids = re.findall(r'node_id="(\w+)"', sources)

    assert sorted(node_ids) == sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.mark.parametrize("page", ROWS)
def test_a_help_page_explains_every_option(page):
    lines = (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if line.startswith("| `")] == ROWS[page], f"run python {Path(__file__).name}"


def _rewrite(page: str) -> None:
    path = PAGES / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    before, rule, rest = text.partition(re.findall(r"\| --- .*\n", text)[0])
    after = "".join(line for line in rest.splitlines(keepends=True) if not line.startswith("| `"))
    path.write_text(before + rule + "\n".join(ROWS[page]) + "\n" + after, encoding="utf-8")


if __name__ == "__main__":
    for name in ROWS:
        _rewrite(name)
