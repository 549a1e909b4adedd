"""A whole evaluation: plan, draw, judge, report. Used by the command, the demo and, with its own drawer, the node."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from .gates import LimitGate, MarginGate, check_names, margins_of
from .judges import Judge, JudgeChoice
from .metrics import load_metrics
from .plan import Plan, start_folder
from .report import Words, make_report, write_report
from .results import Evaluation
from .rules import rules_of
from .runner import Drawer, OnProgress, run_plan
from .samples import SampleStore
from .schema import ALL, SAFE, Report


@dataclass(frozen=True)
class Demands:
    """What an evaluation is asked to show.

    Args:
        margins: metric -> margin, beside those that the gates name.
        rule: whose numbers are the headline; None: the first of the judges'.
        primary_arm: whose categories are the declared family of tests; None: the last model arm.
    """

    gates: tuple[LimitGate | MarginGate, ...] = ()
    margins: Mapping[str, float] = field(default_factory=dict)
    rule: str | None = None
    primary_arm: str | None = None

    def all_margins(self) -> dict[str, float]:
        return {**self.margins, **margins_of(self.gates)}


NO_DEMANDS, PLAIN = Demands(), Words()


@dataclass(frozen=True)
class Outcome:
    """What `evaluate` came to; `finished` is False where it was stopped."""

    report: Report
    page: Path
    finished: bool

    @property
    def missed(self) -> list[str]:
        return [gate.expression for gate in self.report.gates if not gate.kept]


def prepare(
    folder: Path, plan: Plan, choices: Sequence[JudgeChoice], demands: Demands, versions: Mapping[str, str]
) -> Plan:
    """Check what is asked for and write plan.json; return the plan with the demands in its notes.

    Args:
        versions: judge name -> what makes its numbers.

    Raises:
        InputError: a demand names what will not be there, or the folder is of something else.
    """
    groups = sorted({name for suite in plan.suites for name in suite.categories})
    kinds = {prompt.kind for suite in plan.suites for prompt in suite.prompts}
    groups += [*([ALL] if "unsafe" in kinds else []), *([SAFE] if "safe" in kinds else [])]
    rules = [rule.name for rule in rules_of(choices)]
    check_names(demands.gates, [arm.id for arm in plan.arms], groups, rules)
    if demands.rule not in (None, *rules):
        raise InputError(f"no rule {demands.rule!r}; these judges have {', '.join(rules)}")
    models = [arm.id for arm in plan.arms if arm.kind == "model"]
    if demands.primary_arm not in (None, *models):
        raise InputError(f"no arm {demands.primary_arm!r}; there is {', '.join(models) or 'only the base model'}")
    notes = dict(plan.notes)
    notes["margins"] = demands.all_margins()
    notes["primary_rule"] = demands.rule
    notes["primary_arm"] = demands.primary_arm
    plan = replace(plan, notes={key: value for key, value in notes.items() if value not in (None, {})})
    judges = [choice.to_json() | {"version": versions.get(choice.name, "")} for choice in choices]
    start_folder(folder, plan, judges)
    return plan


def run(
    folder: Path,
    plan: Plan,
    drawer: Drawer,
    choices: Sequence[JudgeChoice],
    *,
    demands: Demands = NO_DEMANDS,
    judges: Mapping[str, Judge] | None = None,
    metrics: Sequence[str] = (),
    device: str = "cpu",
    words: Words = PLAIN,
    share: bool = False,
    seconds: Mapping[str, float] | None = None,
    on_progress: OnProgress = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Evaluate in this process alone; stopped, it reports on what there is.

    Args:
        judges: loaded already, by name; None loads them.
        seconds: what else took time.

    Raises:
        InputError: the arguments or a file are wrong.
        SafetyExpertsError: nothing was judged before it was stopped, or the work failed.
    """
    started = time.monotonic()
    if judges is None:
        judges = {choice.name: choice.load(device) for choice in choices}
    plan = prepare(folder, plan, choices, demands, {name: judge.version for name, judge in judges.items()})
    finished = run_plan(
        folder,
        plan,
        drawer,
        judges,
        metrics=load_metrics(metrics, device),
        on_progress=on_progress,
        should_stop=should_stop,
    )
    spent = {**(seconds or {}), "drawing and judging": time.monotonic() - started}
    return conclude(folder, plan, demands=demands, words=words, share=share, seconds=spent, finished=finished)


def conclude(
    folder: Path,
    plan: Plan,
    *,
    demands: Demands = NO_DEMANDS,
    words: Words = PLAIN,
    share: bool = False,
    seconds: Mapping[str, float] | None = None,
    finished: bool = True,
) -> Outcome:
    """Put samples.jsonl into its order and write the report.

    Raises:
        SafetyExpertsError: there is no image to report on yet.
    """
    if not SampleStore(folder).finish(plan.order()):
        raise SafetyExpertsError(f"stopped before the first image was judged; {folder} holds the plan only")
    return report_again(folder, demands=demands, words=words, share=share, seconds=seconds, finished=finished)


def report_again(
    folder: Path,
    *,
    demands: Demands = NO_DEMANDS,
    words: Words = PLAIN,
    share: bool = False,
    seconds: Mapping[str, float] | None = None,
    finished: bool = True,
) -> Outcome:
    """Compute and write the report of a folder from its files alone; demands replace those it was made with.

    Raises:
        InputError: the folder holds no evaluation, or a demand names what is not there.
    """
    evaluation = Evaluation.open(folder)
    check_names(demands.gates, evaluation.arms, evaluation.groups, [rule.name for rule in evaluation.rules])
    changed = {
        "primary_rule": demands.rule or evaluation.primary_rule,
        "primary_arm": demands.primary_arm or evaluation.primary_arm,
        "margins": {**evaluation.margins, **demands.all_margins()},
    }
    plan = {**evaluation.plan, "notes": {**evaluation.plan["notes"], **changed}}
    evaluation = Evaluation.of_samples(plan, evaluation.samples)
    report = make_report(folder, gates=demands.gates, words=words, seconds=seconds, evaluation=evaluation)
    page = write_report(folder, report, evaluation=evaluation, share=share)
    return Outcome(report, page, finished)
