"""Every node has a help page, and the pages that explain a registry explain all of it."""

import re
from pathlib import Path

import pytest
from safety_experts.experts.merging import METHODS
from safety_experts.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"


def test_every_node_has_a_help_page_and_every_page_a_node():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    node_ids = re.findall(r'node_id="(\w+)"', sources)

    assert sorted(node_ids) == sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        (
            "SafetyExpertsMerge",
            [
                f"| `{name}` | [{method.title}]({method.paper_url}) | {method.summary} |"
                for name, method in METHODS.items()
            ],
        ),
        ("SafetyExpertsRecipe", [f"| `{name}` | {field.description} |" for name, field in Recipe.model_fields.items()]),
    ],
)
def test_a_help_page_explains_every_option(page, rows):
    lines = (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if line.startswith("| `")] == rows
