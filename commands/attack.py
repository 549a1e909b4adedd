"""`safety-experts attack`: look for prompts that bring a concept back, and draw them with and without experts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, SafetyExpertsError
from .drawing import add_drawing_arguments, chosen_generation
from .sharing import this_process

if TYPE_CHECKING:
    from ..evaluation.attacks.attack import AttackSettings

HELP = "search prompts that bring unsafe content back, and measure them against controls on fresh seeds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--expert", action="append", default=[], metavar="[LABEL=]FILE[@S]", help="as evaluate's")
    parser.add_argument("--prompts", required=True, metavar="P", help="prompt pairs: the concept is learned from them")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="prompts of each category (default: 20)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="report and attacks.jsonl")
    parser.add_argument("--judge", action="append", required=True, metavar="J", help="KIND or NAME=KIND")
    parser.add_argument("--set", action="append", default=[], metavar="J.OPTION=V", help="option of a judge")
    parser.add_argument(
        "--through",
        default="text",
        choices=("text", "unet"),
        help="text: one search through the text encoder, for all arms; unet: a search of each arm, with its weights",
    )
    parser.add_argument("--method", default="swap", choices=("swap", "published"), help="published: Ring-A-Bell's")
    parser.add_argument("--words", type=int, default=16, metavar="K", help="words to search (default: 16)")
    parser.add_argument("--whole", action="store_true", help="whole prompts, as published; else words behind the safe")
    parser.add_argument("--eta", type=float, default=3.0, help="how far along the concept to aim (default: 3)")
    parser.add_argument(
        "--search-steps", type=int, metavar="N", help="of swap (default: 150; 60 through the UNet), or generations"
    )
    parser.add_argument(
        "--search-batch", type=int, metavar="N", help="swaps a step (default: 256; 24 through the UNet), or population"
    )
    parser.add_argument("--bank", type=int, default=16, metavar="N", help="noises compared at, through the UNet")
    parser.add_argument("--ban", action="append", default=[], metavar="WORD", help="a word not to use")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="fresh pictures of each prompt (default: 4)")
    add_drawing_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print report.json")


def run(arguments: argparse.Namespace) -> None:
    if min(arguments.limit, arguments.seeds, arguments.batch_size) < 1:
        raise InputError("--limit, --seeds and --batch-size must be at least 1")
    from ..evaluation.arms import read_arms
    from ..evaluation.attacks.attack import AttackLog, notes_of, suites_of
    from ..evaluation.attacks.attacking import find_prompts
    from ..evaluation.drawing import drawer_of
    from ..evaluation.evaluate import run as evaluate
    from ..evaluation.judges import parse_judges
    from ..evaluation.plan import Plan, check_folder
    from ..evaluation.report import Words
    from ..evaluation.suites import read_suite
    from ..models.checkpoint import load_checkpoint
    from .evaluate import print_outcome
    from .progress import progress_bar
    from .stopping import stop_when_asked

    settings = _settings(arguments)
    check_folder(arguments.out)
    choices = parse_judges(arguments.judge, arguments.set)
    judges = {choice.name: choice.load(arguments.device or "cpu") for choice in choices}
    suite = read_suite(arguments.prompts).sampled(arguments.limit, 0)
    arms = read_arms(arguments.expert, with_null=False)
    checkpoint = load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer)
    _, _, device = this_process(arguments.device)
    generation = chosen_generation(arguments, checkpoint.family, device)
    with drawer_of(checkpoint, {arm.arm.id: arm.experts for arm in arms}, generation, device) as drawer:
        log = AttackLog(arguments.out, checkpoint.sha256, settings)
        with stop_when_asked() as should_stop, progress_bar("searching") as show:
            found = find_prompts(
                drawer, suite, [arm.arm for arm in arms], settings, log=log, on_prompt=show, should_stop=should_stop
            )
            if should_stop():
                raise SafetyExpertsError(
                    f"stopped while searching; {len(found)} found are kept in {log.path}, and the same command goes on"
                )
        suites = suites_of(suite, found, settings)
        plan = Plan(
            {"name": checkpoint.name, "sha256": checkpoint.sha256, "family": checkpoint.family},
            generation.to_json(),
            tuple(arm.arm for arm in arms),
            suites,
            arguments.seeds,
            arguments.batch_size,
            notes_of(suites, found, settings),
        )
        with stop_when_asked() as should_stop, progress_bar("drawing") as show:
            outcome = evaluate(
                arguments.out,
                plan,
                drawer,
                choices,
                judges=judges,
                device=str(device),
                words=Words("Under attack"),
                on_progress=lambda done, total, images: show(done, total),
                should_stop=should_stop,
            )
    for row in outcome.report.attacks:
        if not arguments.json and row.budget in (1, arguments.seeds):
            print(f"{row.arm}, {row.suite}: {row.success * 100:.0f} % unsafe, best of {row.budget}")
    print_outcome(outcome, arguments)


def _settings(arguments: argparse.Namespace) -> "AttackSettings":
    from ..evaluation.attacks.attack import BUDGETS, DENOISER, TEXT, AttackSettings

    through = {"text": TEXT, "unet": DENOISER}[arguments.through]
    steps, batch = BUDGETS[through]
    return AttackSettings(
        arguments.method,
        arguments.words,
        arguments.eta,
        arguments.whole,
        steps if arguments.search_steps is None else arguments.search_steps,
        batch if arguments.search_batch is None else arguments.search_batch,
        tuple(arguments.ban),
        through=through,
        bank=arguments.bank,
    )
