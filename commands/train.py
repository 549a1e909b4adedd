"""`safety-experts train`: one expert from a preference dataset."""

import argparse
import json
from pathlib import Path

from ..errors import InputError

HELP = "train one LoRA safety expert from a preference dataset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="preference dataset folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="expert to write (.safetensors)")
    parser.add_argument("--category", metavar="C", help="train on this category's pairs only")
    parser.add_argument("--recipe", default="sd15", metavar="R", help="shipped recipe or YAML file (default: sd15)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    parser.add_argument("--device", help="torch device (default: what accelerate chooses)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument(
        "--with-expert",
        action="append",
        default=[],
        metavar="FILE",
        help="train on the model with this expert in it, frozen (default: without any); may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state an interrupted run left")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out {arguments.out} must end in .safetensors")
    if arguments.out.exists() and not (arguments.overwrite or arguments.resume):
        raise InputError(f"--out {arguments.out} exists; choose another name or add --overwrite or --resume")
    from ..training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)

    from tqdm import tqdm

    from ..experts.expert_file import load_expert
    from ..preferences.categories import canonical_category
    from ..preferences.dataset import PreferenceDataset
    from ..training.trainer import StepRecord, train_expert

    bar: tqdm | None = None

    def show(record: StepRecord) -> None:
        nonlocal bar
        if bar is None or bar.desc != record.stage:
            if bar is not None:
                bar.close()
            bar = tqdm(total=record.num_steps, desc=record.stage)
            bar.desc = record.stage
        bar.update(record.step - bar.n)
        if record.metrics:
            bar.set_postfix({name: f"{record.metrics[name]:.3g}" for name in ("loss", "rewards/accuracies")})

    try:
        result = train_expert(
            arguments.model,
            PreferenceDataset.open(arguments.dataset),
            recipe,
            arguments.out,
            category=canonical_category(arguments.category) if arguments.category else None,
            device=arguments.device,
            tokenizer_folder=arguments.tokenizer,
            with_experts=[load_expert(path) for path in arguments.with_expert],
            resume=arguments.resume,
            on_step=show,
        )
    finally:
        if bar is not None:
            bar.close()
    if arguments.json:
        print(json.dumps({"expert": str(result.path), "steps": len(result.records), **result.records[-1]}))
    else:
        print(f"{result.path}: {len(result.records)} steps, {', '.join(result.expert.info['categories'])}")
