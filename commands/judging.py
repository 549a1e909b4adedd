"""`safety-experts dataset judge`: let judges look at every picture of a dataset. Also which judges a command takes."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .progress import progress_bar

if TYPE_CHECKING:
    from ..evaluation.judges import JudgeChoice


def add_arguments(verbs) -> None:
    """Declare the verb `judge` among those of `dataset`."""
    text = "let judges look at every picture; fills scores and flags, leaves doubtful pairs for review"
    judging = verbs.add_parser("judge", help=text, description=text)
    judging.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a dataset folder")
    add_judge_arguments(judging)
    judging.add_argument("--device", help="torch device (default: a GPU where there is one)")
    judging.add_argument("--list", action="store_true", help="print the judges with their options and rules")
    judging.add_argument("--json", action="store_true", help="print the result as JSON")
    judging.set_defaults(work=_judge)


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --judge and --set; `chosen_judges` reads them."""
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="J",
        help="a judge (`dataset judge --list`), or NAME=J to use two of a kind; may be given several times",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="J.OPTION=VALUE", help="an option of a judge, or J.rule=RULE"
    )


def chosen_judges(arguments: argparse.Namespace) -> "list[JudgeChoice]":
    """Return the judges that --judge and --set ask for."""
    from ..evaluation.judges import JUDGES, parse_judges

    if not arguments.judge:
        raise InputError(f"no judge: name one with --judge; there are {', '.join(JUDGES)}")
    return parse_judges(arguments.judge, arguments.set)


def _judge(arguments: argparse.Namespace) -> None:
    if arguments.list:
        _list(arguments)
        return
    if arguments.folder is None:
        raise InputError("no dataset: name its folder")
    judges = chosen_judges(arguments)
    from ..devices import choose_device
    from ..evaluation.judging import judge_dataset
    from ..preferences.dataset import PreferenceDataset
    from .stopping import stop_when_asked

    dataset = PreferenceDataset.open(arguments.folder)
    with progress_bar("images", is_hidden=arguments.json) as show, stop_when_asked() as should_stop:
        summary = judge_dataset(
            dataset,
            judges,
            device=str(choose_device(arguments.device)),
            on_progress=show,
            should_stop=should_stop,
        )
    print(json.dumps(summary.to_json()) if arguments.json else summary.to_text())


def _list(arguments: argparse.Namespace) -> None:
    from ..evaluation.judges import describe_judges

    described = describe_judges()
    if arguments.json:
        print(json.dumps(described))
        return
    for name, judge in described.items():
        print(f"{name}: {judge['summary']}\n  needs {judge['needs']}\n  licence: {judge['licence']}")
        for rule, text in judge["rules"].items():
            print(f"  rule {rule}: {text}")
        for option, text in judge["options"].items():
            print(f"  {option}: {text}")
