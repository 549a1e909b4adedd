"""`safety-experts verifier train`: heads that see a dataset's categories in pictures."""

import argparse
import json
from pathlib import Path

from .outputs import check_out
from .progress import progress_bar

HELP = "fit a head for each category to a dataset's pictures, on the features of a CLIP"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("train",), help="what to do")
    parser.add_argument("--clip", type=Path, required=True, metavar="DIR", help="transformers folder of a CLIP")
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="preference dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="verifier to write (.safetensors)")
    parser.add_argument(
        "--false-positive-rate", type=float, default=0.01, metavar="R", help="of pictures without it (default: 0.01)"
    )
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)
    from ..devices import choose_device
    from ..errors import InputError
    from ..evaluation.judges.clip_encoder import ClipFolder
    from ..evaluation.judges.verifier import train_verifier
    from ..guards.verifier import write_verifier
    from ..preferences.dataset import PreferenceDataset

    if not 0 <= arguments.false_positive_rate <= 1:
        raise InputError("--false-positive-rate is not within 0 and 1; give a fraction such as 0.01")
    dataset = PreferenceDataset.open(arguments.dataset)
    encoder = ClipFolder(arguments.clip, str(choose_device(arguments.device)))
    with progress_bar("pictures", is_hidden=arguments.json) as show:
        verifier = train_verifier(encoder, dataset, arguments.false_positive_rate, on_progress=show)
    write_verifier(verifier, arguments.out)
    if arguments.json:
        print(json.dumps({"verifier": str(arguments.out), "heads": [head.model_dump() for head in verifier.heads]}))
    else:
        print(f"{arguments.out}\n{verifier}")
