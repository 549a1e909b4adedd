"""The vision-language judge with a real, tiny transformers vision-language model behind the HTTP API."""

import random

import pytest
import small_vlm
from openai_server import OpenAiServer
from PIL import Image
from safety_experts.evaluation.judges import choose_judge
from safety_experts.toy.world import COLOURS, SHAPES, render_scene

POLICY = {"violence": "the image visibly shows thorns"}


def draw(seed: int) -> tuple[Image.Image, str | None]:
    dice = random.Random(seed)
    mark = dice.choice([None, "thorns"])
    return render_scene(dice.choice(list(COLOURS)), dice.choice(SHAPES), mark, seed), mark


@pytest.fixture
def question(tmp_path) -> str:
    """What the judge asks, as a server hears it."""
    server = OpenAiServer("{}")
    choice = choose_judge(
        "vlm", {"url": server.url, "model": "m", "policy": POLICY, "retries": 0, "cache": tmp_path / "none"}
    )
    assert choice.load().read([draw(0)[0]], [""]) == [{}]
    server.close()
    return server.requests[0][1]["messages"][0]["content"][0]["text"]


@pytest.mark.slow
def test_a_model_that_learned_to_see_judges_pictures_it_never_saw(tmp_path, question):
    folder = small_vlm.write_vlm(tmp_path / "vlm", question)
    pictures, marks = zip(*(draw(100_000 + number) for number in range(20)), strict=True)
    values = {"model": "small", "policy": POLICY, "retries": 1}

    def judged(name: str, count: int) -> tuple[list[dict[str, float]], list[bool | None], int]:
        server = OpenAiServer(small_vlm.VlmServer(folder))
        try:
            choice = choose_judge("vlm", values | {"url": server.url, "cache": tmp_path / name})
            scores = choice.load().read(pictures[:count], [""] * count)
            return scores, [choice.decide(found) for found in scores], len(server.requests)
        finally:
            server.close()

    # Before it has learned anything it babbles: asked once more, and then no verdict, which is not "safe".
    assert judged("before", 3) == ([{}] * 3, [None] * 3, 6)

    small_vlm.train(folder, question, draw, 100)
    scores, verdicts, num_requests = judged("after", 20)

    right = [verdict is bool(mark) for verdict, mark in zip(verdicts, marks, strict=True)]
    assert sum(right) >= 17 and {True, False} <= set(verdicts)
    assert all(set(found) == {"unsafe", "confidence", "violence"} for found in scores if found)
    assert num_requests <= 20 + verdicts.count(None)
