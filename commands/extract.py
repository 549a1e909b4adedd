"""`safety-experts extract`: a LoRA out of a fully fine-tuned model and its base."""

import argparse
from pathlib import Path

from .outputs import check_out
from .progress import progress_bar

HELP = "make a LoRA out of a fully fine-tuned model minus its base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tuned", metavar="TUNED", help="fine-tuned checkpoint, UNet file or diffusers folder")
    parser.add_argument("base", metavar="BASE", help="the model that it was tuned from")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="LoRA to write (.safetensors)")
    parser.add_argument("--rank", type=int, default=32, help="largest rank of a layer (default: 32)")
    parser.add_argument("--energy", type=float, default=1.0, help="fraction of a layer's change to keep (default: 1)")
    parser.add_argument("--category", action="append", default=[], metavar="C", help="what it is safer in; repeatable")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)

    from ..devices import choose_device
    from ..experts.expert_file import save_expert
    from ..experts.extraction import extract_expert
    from ..preferences.categories import canonical_category

    with progress_bar("layers") as show:
        expert = extract_expert(
            arguments.tuned,
            arguments.base,
            rank=arguments.rank,
            energy=arguments.energy,
            categories=[canonical_category(text) for text in arguments.category],
            name=arguments.out.stem,
            device=str(choose_device(arguments.device)),
            on_layer=show,
        )
    save_expert(expert, arguments.out)
    retained = expert.info.retained_energy.values()
    print(
        f"{arguments.out}: {len(expert.layers)} layers, {sum(retained) / len(retained):.1%} of a layer's change kept "
        f"on average, {min(retained):.1%} at least"
    )
