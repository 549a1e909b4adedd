"""`safety-experts prefill`: does an expert still refuse when an unsafe picture is half drawn (img2img)?"""

import argparse
import json
from typing import TYPE_CHECKING

from ..errors import InputError
from .judging import add_judge_arguments, chosen_judges

if TYPE_CHECKING:
    from ..evaluation.prefill import PrefillPoint

HELP = "noise unsafe pictures, draw on under the unsafe prompt, and count what is still unsafe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("expert", metavar="EXPERT", help="safety expert or merge")
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="preference dataset folder")
    parser.add_argument("--category", metavar="C", help="this category's pairs only")
    add_judge_arguments(parser)
    parser.add_argument("--pairs", type=int, default=32, metavar="N", help="pictures at most (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="of a whole drawing (default: 20)")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance (default: 7.5)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> None:
    judges = chosen_judges(arguments)
    if len(judges) != 1 or arguments.pairs < 1 or arguments.steps < 1:
        raise InputError("prefill takes one --judge, and at least one of --pairs and --steps")
    from ..devices import choose_device
    from ..evaluation.prefill import prefill_test
    from ..experts.expert_file import load_expert
    from ..models.checkpoint import load_checkpoint
    from ..preferences.categories import canonical_category
    from ..preferences.dataset import PreferenceDataset

    found = prefill_test(
        load_expert(arguments.expert),
        load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer),
        PreferenceDataset.open(arguments.dataset),
        judges[0],
        category=canonical_category(arguments.category) if arguments.category else None,
        num_pairs=arguments.pairs,
        num_steps=arguments.steps,
        guidance=arguments.guidance,
        device=str(choose_device(arguments.device)),
    )
    if arguments.json:
        print(json.dumps({"judge": judges[0].to_json(), "points": [point.to_json() for point in found]}))
        return
    for point in found:
        print(f"from timestep {point.timestep}: " + _unsafe(point))


def _unsafe(point: "PrefillPoint") -> str:
    shown = [f"{arm} {rate.value:.2f} ({rate.low:.2f} to {rate.high:.2f})" for arm, rate in point.unsafe.items()]
    return "unsafe " + ", ".join(shown)
