"""Curves of an evaluation: success of attacks over their budget, and what each arm gives up for what it gains."""

import math
from collections.abc import Mapping, Sequence

from .metrics import score_of_metric
from .results import ALL_SUITES, Evaluation
from .samples import Sample
from .schema import ALL, SAFE, AttackRow, FrontierPoint
from .statistics import share_by_prompt


def attack_rows(evaluation: Evaluation) -> list[AttackRow]:
    """Return success over the budget of fresh images, of every arm and list of an attack; [] for other runs.

    Of k images of a prompt of which h are unsafe, the best of b is unsafe with chance 1 − C(k−h, b) / C(k, b).
    """
    verdicts = evaluation.verdicts[evaluation.primary_rule]
    rows = []
    for suite in evaluation.plan["notes"].get("attack_suites", []):
        for arm in evaluation.arms:
            outcomes: dict[tuple, list[bool]] = {}
            for sample in evaluation.select(arm, suite, ALL):
                verdict = verdicts[sample.key]
                if verdict is not None:
                    outcomes.setdefault(sample.pair_key[:2], []).append(verdict)
            for budget in range(1, evaluation.plan["images_per_prompt"] + 1):
                chances = {p: [best_of(images, budget)] for p, images in outcomes.items() if len(images) >= budget}
                if chances:
                    mean = share_by_prompt(chances)
                    rows.append(
                        AttackRow(
                            arm=arm,
                            suite=suite,
                            budget=budget,
                            success=mean.value,
                            low=mean.low,
                            high=mean.high,
                            num_prompts=mean.num_prompts,
                        )
                    )
    return rows


def frontier_points(evaluation: Evaluation) -> list[FrontierPoint]:
    """Return a point an arm: unsafe rate over all unsafe prompts, and utility on safe ones.

    Utility is the mean of the metrics that say whether a safe prompt's content is there, or, without any, the
    share of safe prompts that are not flagged.
    """
    points = []
    about = {arm["id"]: arm for arm in evaluation.plan["arms"]}
    content = sorted(
        name
        for name in {name for sample in evaluation.samples for name in sample.metrics}
        if (measured := score_of_metric(name)) and measured.is_rate
    )
    for arm in evaluation.arms:
        unsafe = _share(evaluation.select(arm, ALL_SUITES, ALL), evaluation.verdicts[evaluation.primary_rule])
        safe = evaluation.select(arm, ALL_SUITES, SAFE)
        flagged = _share(safe, evaluation.verdicts[evaluation.primary_rule])
        if unsafe is None or flagged is None:
            continue
        values = [s.metrics[name] for s in safe for name in content if name in s.metrics]
        utility = sum(values) / len(values) if values else 1 - flagged
        points.append(
            FrontierPoint(
                arm=arm,
                series=about[arm]["series"],
                position=about[arm]["position"],
                unsafe=unsafe,
                utility=utility,
            )
        )
    return points


def best_of(images: Sequence[bool], budget: int) -> float:
    return 1 - math.comb(len(images) - sum(images), budget) / math.comb(len(images), budget)


def _share(samples: Sequence[Sample], verdicts: Mapping) -> float | None:
    judged = [verdict for sample in samples if (verdict := verdicts[sample.key]) is not None]
    return sum(judged) / len(judged) if judged else None
