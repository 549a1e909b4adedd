"""report.json and report.html of an evaluation: what changed, for a person in a hurry and for a program."""

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import write_atomically
from .costs import cost_rows
from .curve_rows import attack_rows, frontier_points
from .gates import LimitGate, MarginGate, hold
from .machine import describe_machine
from .pictures import RANKING, Album
from .plan import BASE, NULL, read_prompts
from .report_view import View, percent, points
from .results import ALL_SUITES, Evaluation
from .rings import ring_rows, selectivity_rows
from .schema import (
    ALL,
    SAFE,
    DistanceRow,
    PromiseRow,
    Report,
    RuleRow,
)
from .statistics import smallest_margin

PAGE_NAME, SHARED_NAME, DATA_NAME = "report.html", "report-shared.html", "report.json"
DISTANCES_NAME = "distances.json"
_TEMPLATES = Path(__file__).with_name("templates")
_MOST_COLUMNS = 60


@dataclass(frozen=True)
class Words:
    """What a report says beside the numbers it computes."""

    title: str = "Before and after"
    summary: str = ""
    promises: tuple[PromiseRow, ...] = ()


def make_report(
    folder: Path,
    *,
    gates: Sequence[LimitGate | MarginGate] = (),
    words: Words,
    seconds: Mapping[str, float] | None = None,
    evaluation: Evaluation | None = None,
) -> Report:
    """Compute everything a report says from the files of an evaluation.

    Raises:
        InputError: the folder holds no evaluation, or a file of it is wrong.
    """
    evaluation = evaluation or Evaluation.open(folder)
    plan = evaluation.plan
    rates, contrasts, kept = evaluation.rates(), evaluation.contrasts(), evaluation.non_inferiority()
    rings = ring_rows(evaluation)
    models = [arm["id"] for arm in plan["arms"] if arm["kind"] == "model" and arm["id"] in evaluation.arms]
    expected = len(plan["arms"]) * plan["images_per_prompt"] * sum(suite["num_prompts"] for suite in plan["suites"])
    return Report(
        schema="safety-experts/report/1",
        title=words.title,
        summary=words.summary,
        promises=list(words.promises),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=describe_machine("diffusers", "transformers"),
        seconds={name: round(value, 1) for name, value in (seconds or {}).items()},
        complete=len(evaluation.samples) == expected,
        model=plan["model"],
        arms=plan["arms"],
        primary_arm=evaluation.primary_arm,
        primary_rule=evaluation.primary_rule,
        generation=plan["generation"],
        images_per_prompt=plan["images_per_prompt"],
        suites=plan["suites"],
        detectors=plan["judges"],
        rules=[RuleRow(id=rule.name, expression=rule.summary) for rule in evaluation.rules],
        results=rates,
        contrasts=contrasts,
        metrics=evaluation.metric_rows(),
        distances=read_distances(folder),
        non_inferiority=kept,
        rings=rings,
        selectivity=selectivity_rows(evaluation, rings),
        frontier=frontier_points(evaluation),
        attacks=attack_rows(evaluation),
        costs=[row for row in cost_rows(folder) if row.arm in evaluation.arms],
        gates=hold(gates, models, rates, contrasts, kept),
        power=what_could_be_shown(evaluation),
        notes=plan["notes"],
    )


def read_distances(folder: Path) -> list[DistanceRow]:
    """Return distances.json; none where nothing was measured.

    Raises:
        InputError: it is damaged.
    """
    import pydantic

    path = folder / DISTANCES_NAME
    if not path.exists():
        return []
    try:
        return pydantic.TypeAdapter(list[DistanceRow]).validate_json(path.read_bytes())
    except pydantic.ValidationError:
        raise InputError(f"{path}: is damaged; remove it and measure again") from None


def what_could_be_shown(evaluation: Evaluation) -> list[str]:
    """Say what an evaluation of this size can show, before anybody reads what it did show."""
    sentences = []
    for group in evaluation.groups:
        prompts = len({sample.pair_key[:2] for sample in evaluation.select(BASE, ALL_SUITES, group)})
        if not prompts:
            continue
        if group == SAFE:
            least = smallest_margin(prompts)
            sentences.append(
                f"{prompts} safe prompts: with no loss at all, a loss of {least * 100:.1f} points or more is excluded."
            )
        else:
            most = smallest_margin(prompts)
            name = "all unsafe prompts together" if group == ALL else group
            sentences.append(f"{name}, {prompts} prompts: no hit at all would still allow {most * 100:.1f} %.")
    return sentences


def write_report(folder: Path, report: Report, *, evaluation: Evaluation, share: bool = False) -> Path:
    """Write report.json and report.html (with `share` also report-shared.html); return the page's path.

    Raises:
        SafetyExpertsError: the folder cannot be written to.
        InputError: a picture is missing or broken.
    """
    with write_atomically(folder / DATA_NAME) as temporary:
        temporary.write_text(report.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    prompts = read_prompts(folder)
    for name, hidden in ((PAGE_NAME, False), *(((SHARED_NAME, True),) if share else ())):
        album = Album(folder, evaluation, prompts, share=hidden)
        page = render(report, evaluation, album)
        with write_atomically(folder / name) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return folder / PAGE_NAME


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        InputError: it is missing, or not of this schema.
    """
    import pydantic

    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no such file: {path}; check the name") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; write the report anew") from None


def render(report: Report, evaluation: Evaluation, album: Album) -> str:
    """Return the page."""
    view = View(report)
    arm = evaluation.primary_arm
    shown = [name for name in evaluation.arms if name != NULL]
    has_null = NULL in evaluation.arms
    return _template().render(
        report=report,
        view=view,
        share=album.share,
        headlines=view.headlines(),
        kept=[*view.kept_lines(), *view.ring_lines()],
        pairs=album.pairs(arm) if arm in evaluation.arms else [],
        ranking=RANKING,
        dumbbell=view.dumbbells(),
        frontier=view.frontier(),
        attack_curves=view.attack_curves(),
        grid_arms=[view.title_of(name) for name in [*shown, *([NULL] if has_null else [])]],
        columns=album.columns([*shown, *([NULL] if has_null else [])], arm, _MOST_COLUMNS)
        if arm in evaluation.arms
        else [],
        num_columns=len({sample.pair_key for sample in evaluation.samples if sample.arm == arm}),
    )


@functools.cache
def _template():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    environment.filters["points"] = points
    return environment.get_template("report.html.j2")
