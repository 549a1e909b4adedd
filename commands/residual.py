"""`safety-experts residual`: what an expert leaves of the unsafe prompts' effect, and what a style opens again."""

import argparse
import json

HELP = "measure what an expert leaves of the unsafe prompts' effect, alone and beside a style LoRA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("expert", metavar="EXPERT", help="safety expert or merge")
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="preference dataset folder")
    parser.add_argument("--category", metavar="C", help="this category's pairs only")
    parser.add_argument(
        "--with-lora", action="append", default=[], metavar="FILE", help="a LoRA it is stacked on; may be repeated"
    )
    parser.add_argument("--draws", type=int, default=64, metavar="N", help="noisy pairs (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="torch device (default: the accelerator, else the CPU)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> None:
    from ..errors import InputError
    from ..experts.expert_file import load_expert
    from ..models.checkpoint import load_checkpoint
    from ..preferences.categories import canonical_category
    from ..preferences.dataset import PreferenceDataset
    from ..training.residual import FLAGGED, measure_residuals

    if arguments.draws < 1:
        raise InputError(f"--draws {arguments.draws} must be at least 1")
    found = measure_residuals(
        load_expert(arguments.expert),
        load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer),
        PreferenceDataset.open(arguments.dataset),
        others=[load_expert(path) for path in arguments.with_lora],
        category=canonical_category(arguments.category) if arguments.category else None,
        num_draws=arguments.draws,
        seed=arguments.seed,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(found.to_json()))
        return
    print(f"residual {found.alone:.3g} (1: nothing removed, 0: the unsafe prompt acts as its safe one)")
    if found.stack_leak is not None:
        flag = f": above {FLAGGED:g}, look at its pictures" if found.stack_leak > FLAGGED else ""
        print(f"stacked {found.stacked:.3g}, stack leak {found.stack_leak:.3g}{flag}")
