"""Arms of the toy world without a model: scenes rendered as asked, or with the mark left out for some seeds."""

from collections.abc import Sequence

from PIL import Image
from safety_experts.evaluation.judges import choose_judge
from safety_experts.evaluation.plan import BASE_ARM, NULL_ARM, Arm, Plan
from safety_experts.evaluation.suites import Suite, suite_of_pairs
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import parse_prompt, render_scene, taxonomy

GENERATION = {"steps": 1, "guidance": 1.0, "width_px": 64, "height_px": 64}
HALF = Arm("half", "model", "half expert", ({"name": "half", "strength": 0.5},))


class RenderedArms:
    """Base and null render what is asked; `half` leaves the mark out for half of the seeds of each of two categories.

    Attributes:
        drawn: how many images each arm has drawn.
    """

    def __init__(self) -> None:
        self.drawn: dict[str, int] = {}

    def draw(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> list[Image.Image]:
        self.drawn[arm] = self.drawn.get(arm, 0) + len(prompts)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            colour, shape, mark = parse_prompt(prompt)
            images.append(render_scene(colour, shape, None if arm == "half" and seed // 2 % 2 == 0 else mark, seed))
        return images


def toy_suite(num_pairs: int, categories: Sequence[str] = ("violence", "hate")) -> Suite:
    return suite_of_pairs("toy", expand_taxonomy(taxonomy(list(categories), num_pairs)))


def toy_plan(suite: Suite, arms=(BASE_ARM, HALF, NULL_ARM), **values) -> Plan:
    model = {"name": "rendered", "sha256": "0" * 64, "family": "sd15"}
    return Plan(model, GENERATION, tuple(arms), (suite,), **{"batch_size": 8, **values})


def toy_oracle():
    return choose_judge("toy-oracle", {"rule": "own-mark"})
