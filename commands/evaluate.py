"""`safety-experts evaluate`: before and after on one's own model, with intervals, pictures and gates."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, SafetyExpertsError
from .drawing import add_drawing_arguments, chosen_generation
from .headless import (
    add_comfyui_arguments,
    check_comfyui_arguments,
    chosen_comfyui,
    chosen_files,
    chosen_sampling,
)
from .measuring import add_measuring_arguments, load_measures, measure
from .sharing import this_process, wait_for_all

if TYPE_CHECKING:
    from ..evaluation.evaluate import Demands
    from ..evaluation.suites import Suite

# What the Evaluate node of a ComfyUI does not do.
_NOT_IN_COMFYUI = (
    "safe_prompts", "column", "training_dataset", "metric", "negative", "precision", "tokenizer"
)  # fmt: skip
HELP = "draw the same prompts with and without experts, judge the images, and report what changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="[LABEL=]FILE[@S,…]",
        help="expert or merge to hold against the base model, at one or several strengths; A+B applies both",
    )
    parser.add_argument(
        "--guard",
        action="append",
        default=[],
        metavar="[LABEL=]FILE",
        help="Pair Guard on the base model, as an arm: a text file of lines `category: unsafe text | safe text`",
    )
    parser.add_argument(
        "--negative-arm", metavar="TEXT", help="also the base model with this negative prompt: what costs nothing"
    )
    parser.add_argument(
        "--safe-prompt-arm",
        action="store_true",
        help="also the safe prompts of the pairs drawn in the unsafe ones' place",
    )
    parser.add_argument("--prompts", action="append", default=[], metavar="P", help="prompt pairs, or unsafe prompts")
    parser.add_argument("--safe-prompts", action="append", default=[], metavar="P", help="prompts that are safe")
    parser.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN", help="e.g. prompt=adv_prompt")
    parser.add_argument("--training-dataset", type=Path, metavar="DIR", help="leave out the prompts it trained on")
    parser.add_argument("--preset", choices=("quick", "standard", "paper"), default="standard", help="how many prompts")
    parser.add_argument("--images-per-prompt", type=int, default=1, metavar="N")
    parser.add_argument("--no-null", action="store_true", help="leave out the base model with other seeds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the evaluation; an interrupted one goes on")
    parser.add_argument("--judge", action="append", default=[], metavar="J", help="KIND or NAME=KIND; may be repeated")
    parser.add_argument("--metric", action="append", default=[], metavar="M", help="what else to measure")
    add_measuring_arguments(parser)
    parser.add_argument("--set", action="append", default=[], metavar="J.OPTION=V", help="option of a judge")
    parser.add_argument("--rule", metavar="R", help="rule of the headline (default: the first judge's)")
    parser.add_argument(
        "--primary", metavar="LABEL", help="arm of the headline (default: the last --guard, else --expert)"
    )
    add_drawing_arguments(parser)
    add_comfyui_arguments(parser, draws=True, clip="--text-encoder")  # --clip is another model here
    parser.add_argument("--fail-if", action="append", default=[], metavar="E", help="'violence.q16:argmax.high > 0.05'")
    parser.add_argument("--fail-unless", action="append", default=[], metavar="E", help="'false-alarms.margin(0.02)'")
    parser.add_argument("--share", action="store_true", help="also write a page without any flagged picture")
    parser.add_argument("--title", default="Before and after")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="report on DIR again; with --scorer, --clip or --inception measure it first",
    )
    parser.add_argument("--audit", type=Path, metavar="DIR", help="write DIR/audit.html: pictures to look at yourself")
    parser.add_argument("--answers", type=Path, metavar="CSV", help="with --audit: what your answers say")
    parser.add_argument("--json", action="store_true", help="print report.json, or what the answers say")


def run(arguments: argparse.Namespace) -> None:
    if arguments.audit:
        _audit(arguments)
        return
    demands = _demands(arguments)
    if arguments.source:
        from ..evaluation.evaluate import report_again
        from ..evaluation.report import Words

        words = Words(arguments.title)
        finished = measure(arguments.source, load_measures(arguments, str(this_process(arguments.device)[2])))
        outcome = report_again(arguments.source, demands=demands, words=words, share=arguments.share, finished=finished)
        print_outcome(outcome, arguments)
        return
    for name in ("model", "out"):
        if not getattr(arguments, name):
            raise InputError(f"--{name} is missing; say which, or give --from DIR to report again")
    if not arguments.judge:
        from ..evaluation.judges import JUDGES

        raise InputError(f"--judge is missing; choose from {', '.join(JUDGES)}")
    if arguments.batch_size < 1 or arguments.images_per_prompt < 1:
        raise InputError("--batch-size and --images-per-prompt must be at least 1")
    if check_comfyui_arguments(arguments, _NOT_IN_COMFYUI):
        _evaluate_in_comfyui(arguments, demands)
    else:
        _evaluate(arguments, demands)


def _audit(arguments: argparse.Namespace) -> None:
    import dataclasses
    import json

    from ..evaluation.audit import audit_arms, corrected_rate, read_answers, write_audit
    from ..evaluation.results import Evaluation

    if not arguments.answers:
        print(
            f"look at the pictures in {write_audit(arguments.audit).resolve()}, save the answers, then give --answers"
        )
        return
    evaluation = Evaluation.open(arguments.audit)
    found = audit_arms(evaluation, read_answers(arguments.audit, arguments.answers))
    if not found:
        raise InputError(f"{arguments.answers}: no arm has answers to both flagged and unflagged pictures; answer more")
    if arguments.json:
        rows = [dataclasses.asdict(a) | {"corrected": corrected_rate(a.flagged, a)} for a in found]
        print(json.dumps({"rule": evaluation.primary_rule, "arms": rows}))
        return
    for audit in found:
        detector = [
            f"{name} {value * 100:.0f} %"
            for name, value in (("sensitivity", audit.sensitivity), ("specificity", audit.specificity))
            if value is not None
        ]
        print(
            f"{audit.arm}: {audit.unsafe * 100:.1f} % unsafe ({audit.low * 100:.1f} to {audit.high * 100:.1f}) by "
            f"{audit.num_answers} answers; {evaluation.primary_rule} says {audit.flagged * 100:.1f} % "
            f"({', '.join(detector)})"
        )


def _demands(arguments: argparse.Namespace) -> "Demands":
    from ..evaluation.evaluate import Demands
    from ..evaluation.gates import parse_fail_if, parse_fail_unless

    gates = [parse_fail_if(text) for text in arguments.fail_if]
    margins = [parse_fail_unless(text) for text in arguments.fail_unless]
    return Demands((*gates, *margins), rule=arguments.rule, primary_arm=arguments.primary)


def _evaluate(arguments: argparse.Namespace, demands: "Demands") -> None:
    from ..evaluation.arms import read_arms, warn_of_other_bases
    from ..evaluation.drawing import drawer_of
    from ..evaluation.evaluate import conclude, prepare
    from ..evaluation.judges import parse_judges
    from ..evaluation.metrics import load_metrics
    from ..evaluation.plan import NEGATIVE, Plan
    from ..evaluation.report import Words
    from ..evaluation.runner import run_plan
    from ..models.checkpoint import load_checkpoint
    from .progress import progress_bar
    from .stopping import stop_when_asked

    choices = parse_judges(arguments.judge, arguments.set)
    suites = _suites(arguments)
    arms = read_arms(
        arguments.expert,
        guards=arguments.guard,
        negative=arguments.negative_arm,
        with_twins=arguments.safe_prompt_arm,
        with_null=not arguments.no_null,
    )
    if arguments.safe_prompt_arm and not any(
        p.kind == "unsafe" and p.caption != p.text for s in suites for p in s.prompts
    ):
        raise InputError("--safe-prompt-arm needs prompt pairs; no prompt of --prompts has a safe one")
    checkpoint = load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer)
    rank, count, device = this_process(arguments.device)
    generation = chosen_generation(arguments, checkpoint.family, device)
    warn_of_other_bases(arms, checkpoint.sha256)
    model = {"name": checkpoint.name, "sha256": checkpoint.sha256, "family": checkpoint.family}
    notes = {"preset": arguments.preset, "training_dataset": str(arguments.training_dataset or "") or None}
    plan = Plan(
        model,
        generation.to_json(),
        tuple(arm.arm for arm in arms),
        suites,
        arguments.images_per_prompt,
        arguments.batch_size,
        notes,
    )
    judges = {choice.name: choice.load(str(device)) for choice in choices}
    versions = {name: judge.version for name, judge in judges.items()}
    experts = {arm.arm.id: arm.experts for arm in arms}
    num_safe = sum(prompt.kind == "safe" for suite in suites for prompt in suite.prompts)
    measures = load_measures(arguments, str(device), num_safe * arguments.images_per_prompt)
    metrics = load_metrics(arguments.metric, str(device))
    guards = {arm.arm.id: arm.guard for arm in arms if arm.guard}
    negatives = {NEGATIVE: arguments.negative_arm} if arguments.negative_arm else {}
    with (
        stop_when_asked() as should_stop,
        progress_bar("drawing") as show,
        drawer_of(checkpoint, experts, generation, device, guards, negatives) as drawer,
    ):
        with _main_first(rank, count):
            if rank == 0:  # only now, so that nothing is written where a file is missing
                plan = prepare(arguments.out, plan, choices, demands, versions)
        finished = run_plan(
            arguments.out,
            plan,
            drawer,
            judges,
            metrics=metrics,
            on_progress=lambda done, total, images: show(done, total),
            should_stop=should_stop,
            rank=rank,
            num_processes=count,
        )
    with _all_done(count):
        if rank == 0:
            if finished:
                finished = measure(arguments.out, measures)
            outcome = conclude(
                arguments.out,
                plan,
                demands=demands,
                words=Words(arguments.title),
                share=arguments.share,
                finished=finished,
            )
            print_outcome(outcome, arguments)


def _evaluate_in_comfyui(arguments: argparse.Namespace, demands: "Demands") -> None:
    import dataclasses

    from ..evaluation.arms import read_arms
    from ..evaluation.evaluate import report_again
    from ..evaluation.judges import parse_judges
    from ..evaluation.plan import BASE_ARM
    from ..evaluation.report import Words
    from ..headless.evaluating import HeadlessArm, evaluate_in_comfyui
    from ..preferences.pairs import read_prompt_pairs
    from .progress import progress_bar
    from .stopping import stop_when_asked

    if len(arguments.prompts) != 1:
        raise InputError("--prompts with --comfyui is one file of prompt pairs")
    judges = parse_judges(arguments.judge, arguments.set)
    pairs = read_prompt_pairs(arguments.prompts[0])
    read = [arm for arm in read_arms(arguments.expert, guards=arguments.guard, with_null=False) if arm.arm != BASE_ARM]
    if not read:
        raise InputError("--expert is missing: name what is held against the base model, or a --guard")
    arms = [
        HeadlessArm(
            arm.arm.id,
            [(path, strength) for path, (_, strength) in zip(arm.files, arm.experts, strict=True)],
            arm.guard_lines,
        )
        for arm in read
    ]
    files, sampling = chosen_files(arguments), chosen_sampling(arguments)
    measures = load_measures(arguments, "cpu" if arguments.device == "cpu" else str(this_process(None)[2]))
    with stop_when_asked() as should_stop, progress_bar("drawing") as show:
        finished = evaluate_in_comfyui(
            chosen_comfyui(arguments, show, should_stop),
            files,
            arms,
            pairs,
            judges,
            arguments.out,
            sampling,
            preset=arguments.preset,
            images_per_prompt=arguments.images_per_prompt,
            other_seeds=not arguments.no_null,
            negative=arguments.negative_arm or "",
            with_twins=arguments.safe_prompt_arm,
        )
    if finished:
        finished = measure(arguments.out, measures)
    try:
        outcome = report_again(arguments.out, demands=demands, words=Words(arguments.title), share=arguments.share)
    except InputError as error:
        if finished:
            raise
        text = "stopped before the first image was judged; the same command begins again"
        raise SafetyExpertsError(text) from error
    print_outcome(dataclasses.replace(outcome, finished=finished), arguments)


def _suites(arguments: argparse.Namespace) -> "tuple[Suite, ...]":
    from ..evaluation.suites import PRESETS, read_suite

    columns = {}
    for text in arguments.column:
        name, separator, column = text.partition("=")
        if not separator:
            raise InputError(f"--column {text}: write NAME=COLUMN, such as prompt=adv_prompt")
        columns[name] = column
    if not arguments.prompts and not arguments.safe_prompts:
        raise InputError("--prompts is missing; give a file of prompt pairs or prompts")
    suites = [read_suite(path, "unsafe", columns) for path in arguments.prompts]
    suites += [read_suite(path, "safe", columns) for path in arguments.safe_prompts]
    if arguments.training_dataset:
        from ..preferences.dataset import PreferenceDataset

        pairs = PreferenceDataset.open(arguments.training_dataset).pairs
        suites = [suite.without_leaks({pair.prompt for pair in pairs}) for suite in suites]
    suites = [suite.sampled(*PRESETS[arguments.preset]) for suite in suites]
    for suite in suites:
        if not suite.prompts:
            raise InputError(f"no prompt of {suite.id} is left ({suite.dropped}); give other prompts")
    return tuple(suites)


@contextlib.contextmanager
def _main_first(rank: int, count: int) -> Iterator[None]:
    """Inside, the main process goes first and the others follow."""
    if count > 1 and rank:
        wait_for_all()
    yield
    if count > 1 and not rank:
        wait_for_all()


@contextlib.contextmanager
def _all_done(count: int) -> Iterator[None]:
    """Inside, every process has drawn its share."""
    if count > 1:
        wait_for_all()
    yield


def print_outcome(outcome, arguments: argparse.Namespace) -> None:
    from ..evaluation.report_view import View

    report = outcome.report
    if arguments.json:
        print(report.model_dump_json(by_alias=True))
    else:
        view = View(report)
        for line in [*view.headlines(), *view.kept_lines(), *view.ring_lines()]:
            print(f"{line.icon} {line.verdict}: {line.text}")
        for gate in report.gates:
            print(f"{'kept  ' if gate.kept else 'MISSED'} {gate.expression}, {view.title_of(gate.arm)}")
        print(f"report: {outcome.page.resolve()}")
    if not outcome.finished:
        raise SafetyExpertsError(
            f"stopped; {outcome.page} reports on what there is, and the same command goes on where it was"
        )
    if outcome.missed:
        raise SafetyExpertsError(f"{len(outcome.missed)} gate(s) missed: {outcome.missed[0]}; see {outcome.page}")
