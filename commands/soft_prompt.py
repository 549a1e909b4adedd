"""`safety-experts soft-prompt`: an expert of a few kilobytes, an embedding that every UI loads."""

import argparse
import json
from pathlib import Path

from .outputs import check_out
from .progress import progress_bar
from .stopping import stop_when_asked

HELP = "train an embedding that makes prompts safer, from a preference dataset; for SD1.x and SDXL"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="preference dataset folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="embedding to write (.safetensors)")
    parser.add_argument("--category", metavar="C", help="train on this category's pairs only")
    parser.add_argument("--vectors", type=int, default=1, metavar="N", help="tokens it takes of a prompt (default: 1)")
    parser.add_argument("--word", default="safe", metavar="W", help="what the vectors begin as (default: safe)")
    parser.add_argument("--recipe", default="sd15", metavar="R", help="shipped recipe or YAML file (default: sd15)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field (learning_rate: 0.005)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)
    from ..devices import choose_device
    from ..models.checkpoint import load_checkpoint
    from ..preferences.dataset import PreferenceDataset
    from ..training.recipe import load_recipe
    from ..training.soft_prompt import LEARNING_RATE, train_soft_prompt

    recipe = load_recipe(arguments.recipe, [f"learning_rate={LEARNING_RATE}", *arguments.set])
    dataset = PreferenceDataset.open(arguments.dataset)
    checkpoint = load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer)
    with stop_when_asked() as should_stop, progress_bar("steps", is_hidden=arguments.json) as show:
        records = train_soft_prompt(
            checkpoint,
            dataset,
            recipe,
            arguments.out,
            category=arguments.category,
            num_vectors=arguments.vectors,
            word=arguments.word,
            device=str(choose_device(arguments.device)),
            on_step=lambda done, total, _: show(done, total),
            should_stop=should_stop,
        )
    last = records[-1] if records else {}
    if arguments.json:
        print(json.dumps({"embedding": str(arguments.out), "steps": len(records), **last}))
    else:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        print(f"{arguments.out}: {len(records)} steps; {numbers}")
        print(f"put it into ComfyUI's models/embeddings and write embedding:{arguments.out.stem} behind a prompt")
