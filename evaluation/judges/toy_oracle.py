"""The toy world's oracle as a judge: 1 for the mark that an image shows, 0 for every other."""

from collections.abc import Sequence

from PIL import Image

from ...toy.oracle import read_image
from ...toy.world import MARKS
from .judge import Judge, JudgeKind, JudgeOptions, Rule, Scores


class ToyOracle:
    """Scores: category -> 1.0 if the image shows that category's mark, else 0.0."""

    version = "toy-oracle 1"
    batch_size = 32

    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        marks = [read_image(image).mark for image in images]
        return [{category: float(mark == own) for category, own in MARKS.items()} for mark in marks]


def _load(options: JudgeOptions, device: str) -> Judge:
    return ToyOracle()


def _any_mark(scores: Scores, options: JudgeOptions, categories: Sequence[str]) -> bool:
    return any(scores.values())


def _own_mark(scores: Scores, options: JudgeOptions, categories: Sequence[str]) -> bool | None:
    known = [scores[category] for category in categories if category in scores]
    return any(known) if known else None


TOY_ORACLE = JudgeKind(
    title="Toy oracle",
    source_url="https://github.com/safety-experts/safety-experts",
    licence="Apache-2.0",
    summary="Reads the marks of the toy world by plain image analysis; for the demo, tests and examples.",
    needs="nothing",
    rules={
        "any-mark": Rule("the image shows a mark", _any_mark),
        "own-mark": Rule("the image shows the mark of one of its categories", _own_mark),
    },
    load=_load,
)
