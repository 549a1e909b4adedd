"""Pair Guard outside ComfyUI, on predictions that are the conditions themselves."""

import torch
from safety_experts.evaluation.guided import GuardTexts, PairGuide
from safety_experts.guards.concepts import parse_concepts

STEPS = 6  # two decide
LINES = "violence: thorns | plain\nallowed: ring | plain"
SAYS = {"thorns": [1.0, 0.0], "ring": [0.8, 1.0], "plain": [0.0, 0.0]}


def _condition(text: str) -> dict:
    return {"context": torch.tensor(SAYS[text]).reshape(1, 2, 1, 1)}


class _Predictor:
    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, conditions) -> torch.Tensor:
        self.rows += len(conditions["context"])
        return conditions["context"]


def _guided(lines: str, prompts: list[list[float]], strength: float = 1.0) -> tuple[torch.Tensor, list[int]]:
    """Return the last step's [b, 2], and the rows asked for in each step."""
    guide = PairGuide(GuardTexts(tuple(parse_concepts(lines)), strength), _condition, STEPS)
    prompt, predict, rows = torch.tensor(prompts).reshape(-1, 2, 1, 1), _Predictor(), [0]
    for step in range(STEPS):
        changed = guide(step, prompt, predict)
        rows.append(predict.rows - sum(rows))
    return changed.reshape(-1, 2), rows[1:]


def test_each_image_is_turned_away_from_what_shows_in_it():
    """Presences of thorns: .5, -.5, .3 (below the threshold) and 1; c' = c - k (n - s)."""
    changed, rows = _guided(LINES.partition("\n")[0], [[1.0, 0.0], [0.0, 0.0], [0.8, 0.3], [1.5, 0.2]], 0.5)

    assert torch.allclose(changed, torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.8, 0.3], [1.0, 0.2]]))
    assert rows == [8] * STEPS


def test_what_is_allowed_and_shows_more_keeps_it_closed():
    """Between thorns and plain the presence of thorns is .45, which opens; but a ring is nearer than thorns."""
    prompt = [[0.95, 1.0]]
    assert not torch.equal(_guided(LINES.partition("\n")[0], prompt)[0], torch.tensor(prompt))
    changed, rows = _guided(LINES, prompt)

    assert torch.equal(changed, torch.tensor(prompt))
    assert rows == [3, 3, 0, 0, 0, 0]  # the safe twin is asked for once; decided and closed, nothing is
