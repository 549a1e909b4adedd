"""`safety-experts merge`: several experts into one file."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..key_values import parse_key_values
from .outputs import check_out
from .progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from ..experts.expert import Expert

HELP = "merge experts into one file that any LoRA loader reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experts", nargs="+", metavar="EXPERT", help="expert files, or LoRAs in any common spelling")
    parser.add_argument("--method", default="linear", metavar="M", help="merge method (default: linear)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="merge to write (.safetensors)")
    parser.add_argument("--weights", metavar="W1,W2,…", help="one number an expert (default: 1 each)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the method")
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE", help="activation counts to read; with --calibration, to write"
    )
    parser.add_argument(
        "--calibration", metavar="DIR", help="dataset on whose prompts to count activations, or to fit strengths"
    )
    parser.add_argument(
        "--recipe", default="strengths", metavar="R", help="recipe for fitting strengths (default: strengths)"
    )
    parser.add_argument("--model", metavar="CKPT", help="base checkpoint to run for --calibration")
    parser.add_argument("--num-prompts", type=int, default=64, metavar="N", help="prompts to run (default: 64)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration's noise (default: 0)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)
    if bool(arguments.calibration) != bool(arguments.model):
        raise InputError("--calibration needs --model and the other way round")
    weights = _parse_weights(arguments.weights)

    from ..devices import choose_device
    from ..experts.expert_file import open_expert, save_expert
    from ..experts.fused import in_one_spelling
    from ..experts.merging import find_method, merge_experts

    method = find_method(arguments.method)
    parameters = method.parse_parameters(parse_key_values(arguments.set))
    experts = [open_expert(path) for path in arguments.experts]
    counts = _activation_counts(arguments, in_one_spelling(experts)) if method.needs_counts else None
    if method.needs_weights and weights is None and arguments.calibration:
        weights = _fit(arguments, experts)
    with progress_bar("layers", is_hidden=arguments.json) as show:
        merged = merge_experts(
            experts,
            arguments.method,
            weights=weights,
            parameters=parameters,
            activation_counts=counts,
            name=arguments.out.stem,
            device=str(choose_device(arguments.device)),
            on_layer=show,
        )
    save_expert(merged, arguments.out)
    if arguments.json:
        found = {"expert": str(arguments.out), "categories": merged.categories, "layers": len(merged.layers)}
        print(json.dumps(found | ({"weights": weights} if weights else {})))
    else:
        print(f"{arguments.out}: {arguments.method} of {len(experts)}, {', '.join(merged.categories)}")
        if method.needs_weights and weights:
            print("weights " + ", ".join(f"{e.name} {weight:g}" for e, weight in zip(experts, weights, strict=True)))


def _parse_weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--weights {text!r} must be numbers with commas between, such as 1,0.5") from error


def _fit(arguments: argparse.Namespace, experts: "Sequence[Expert]") -> list[float]:
    from ..models.checkpoint import load_checkpoint
    from ..preferences.dataset import PreferenceDataset
    from ..training.recipe import load_recipe
    from ..training.strengths import fit_strengths

    with progress_bar("fitting", is_hidden=arguments.json) as show:
        return fit_strengths(
            experts,
            load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer),
            PreferenceDataset.open(arguments.calibration),
            load_recipe(arguments.recipe),
            device=arguments.device,
            on_step=show,
        )


def _activation_counts(arguments: argparse.Namespace, experts: "Sequence[Expert]") -> "dict[str, Tensor] | None":
    from ..experts.co_merge import load_activation_counts, save_activation_counts

    if not arguments.calibration:
        return load_activation_counts(arguments.statistics, experts) if arguments.statistics else None

    from ..models.checkpoint import load_checkpoint
    from ..preferences.dataset import PreferenceDataset
    from ..training.calibration import collect_activation_counts

    with progress_bar("calibration", is_hidden=arguments.json) as show:
        counts = collect_activation_counts(
            experts,
            load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer),
            PreferenceDataset.open(arguments.calibration),
            num_prompts=arguments.num_prompts,
            seed=arguments.seed,
            device=arguments.device,
            on_step=show,
        )
    if arguments.statistics:
        calibration = {
            "dataset": str(arguments.calibration),
            "model": str(arguments.model),
            "num_prompts": arguments.num_prompts,
            "seed": arguments.seed,
        }
        save_activation_counts(arguments.statistics, counts, experts, calibration)
    return counts
