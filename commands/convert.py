"""`safety-experts convert`: any LoRA, LoHa or LoKr file as a LoRA that every loader reads."""

import argparse
from dataclasses import replace
from pathlib import Path

from .outputs import check_out

HELP = "turn a LoRA of any spelling, a LoHa or a LoKr into a LoRA that every loader reads, or into diffusers' spelling"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="LoRA, LoHa or LoKr as safetensors")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="LoRA to write (.safetensors)")
    parser.add_argument("--rank", type=int, default=64, help="largest rank of a LoHa or LoKr layer (default: 64)")
    parser.add_argument("--energy", type=float, default=1.0, help="fraction of a layer's change to keep (default: 1)")
    parser.add_argument(
        "--to",
        choices=("kohya", "diffusers"),
        default="kohya",
        help="diffusers: names and layers of its transformers, fused ones split exactly (default: kohya)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)

    from ..experts.expert_file import save_diffusers, save_expert
    from ..experts.lycoris import convert_lycoris
    from ..tensor_file import read_tensors

    tensors, metadata = read_tensors(arguments.file)
    expert = convert_lycoris(tensors, metadata, arguments.file, rank=arguments.rank, energy=arguments.energy)
    save = save_diffusers if arguments.to == "diffusers" else save_expert
    save(replace(expert, name=arguments.out.stem), arguments.out)
    least = min(expert.info.retained_energy.values(), default=1.0)
    print(f"{arguments.out}: {len(expert.layers)} layers, at least {least:.1%} of each layer's change kept")
