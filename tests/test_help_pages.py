"""Help pages and docs list every option and method (`python tests/test_help_pages.py` rewrites their tables)."""

import re
from pathlib import Path

import pytest
from safety_experts.evaluation.judges import JUDGES, JudgeKind
from safety_experts.experts.merging import METHODS
from safety_experts.training.objectives import OBJECTIVES, Objective
from safety_experts.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
_METHOD_ROWS = [
    f"| `{name}` | [{method.title}]({method.paper_url}) | {method.summary} |" for name, method in METHODS.items()
]


def _summary(objective: Objective) -> str:
    own = {name: field for name, field in objective.parameters.model_fields.items() if name != "weight"}
    numbers = [f"`{name}` ({field.default:g}): {field.description}" for name, field in own.items()]
    return f"{objective.title}, {objective.source}: {objective.formula}. {' '.join(numbers)}".strip()


def _judge_summary(kind: JudgeKind) -> str:
    rules = "; ".join(f"`{name}`: {rule.summary}" for name, rule in kind.rules.items()).replace("|", "\\|")
    facts = f"Needs: {kind.needs}. Licence: {kind.licence}. Rules: {rules}."
    return f"[{kind.title}]({kind.source_url}). {kind.summary} {facts}"


_JUDGE_ROWS = [f"| `{name}` | {_judge_summary(kind)} |" for name, kind in JUDGES.items()]


def _row(name: str, objective: Objective) -> str:
    own = [f"`{key}`" for key in objective.parameters.model_fields if key != "weight"]
    untrained = objective.untrained_loss(objective.parameters())
    cells = [objective.title, objective.source, objective.formula, ", ".join(own) or "-"]
    return f"| `{name}` | {' | '.join(cells)} | {'by the data' if untrained is None else f'{untrained:.3g}'} |"


ROWS = {
    "docs/judges.md": _JUDGE_ROWS,
    "web/docs/SafetyExpertsJudge.md": _JUDGE_ROWS,
    "docs/training.md": [_row(name, objective) for name, objective in OBJECTIVES.items()],
    "docs/merging.md": _METHOD_ROWS,
    "web/docs/SafetyExpertsMerge.md": _METHOD_ROWS,
    "web/docs/SafetyExpertsRecipe.md": [
        *(f"| `{name}` | {field.description} |" for name, field in Recipe.model_fields.items()),
        *(f"| `objective={name}` | {_summary(objective)} |" for name, objective in OBJECTIVES.items()),
    ],
}


def test_every_node_has_a_help_page_and_every_page_a_node():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    node_ids = re.findall(r'node_id="(\w+)"', sources)

    assert sorted(node_ids) == sorted(path.stem for path in PAGES.glob("*.md"))


@pytest.mark.parametrize("page", ROWS)
def test_a_help_page_explains_every_option(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if line.startswith("| `")] == ROWS[page], f"run python {Path(__file__).name}"


def _rewrite(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    marker = "\0"  # where the first row stands, or the end of a table without rows
    lines = [marker if line.startswith("| `") else line for line in text.splitlines()]
    if marker not in lines:
        lines.insert(1 + max(i for i, line in enumerate(lines) if line.startswith("| ---")), marker)
    first = lines.index(marker)
    rest = [line for line in lines[first:] if line != marker]
    path.write_text("\n".join([*lines[:first], *ROWS[page], *rest]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in ROWS:
        _rewrite(name)
