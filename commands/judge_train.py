"""`safety-experts judge-train`: the two vectors of the judge q16, from one's own pictures or from published numbers."""

import argparse
import json
from pathlib import Path

from ..errors import InputError
from .outputs import check_out
from .progress import progress_bar

HELP = "fit the judge q16 to two folders of your own pictures, or convert its published numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", type=Path, metavar="DIR", help="transformers folder of the CLIP that will judge")
    parser.add_argument("--safe", type=Path, metavar="DIR", help="folder of pictures to call safe")
    parser.add_argument("--unsafe", type=Path, metavar="DIR", help="folder of pictures to call unsafe")
    parser.add_argument(
        "--convert", type=Path, metavar="FILE", help="instead: numbers in .json or .safetensors, or Q16's own prompts.p"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="vectors to write (.safetensors)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)
    folders = (arguments.clip, arguments.safe, arguments.unsafe)
    if arguments.convert is None and None in folders:
        raise InputError("name --clip, --safe and --unsafe to fit vectors, or --convert FILE")
    if arguments.convert is not None:
        if any(folders):
            raise InputError("--convert takes no --clip, --safe or --unsafe")
        _convert(arguments)
        return
    from ..devices import choose_device
    from ..evaluation.judges.clip_encoder import ClipFolder
    from ..evaluation.judges.q16_training import train_vectors

    encoder = ClipFolder(arguments.clip, str(choose_device(arguments.device)))
    with progress_bar("pictures", is_hidden=arguments.json) as show:
        accuracy = train_vectors(encoder, arguments.safe, arguments.unsafe, arguments.out, show)
    if arguments.json:
        print(json.dumps({"vectors": str(arguments.out), "held_out_accuracy": accuracy.to_json()}))
    else:
        print(
            f"{arguments.out}: {accuracy.value:.1%} right ({accuracy.low:.1%} to {accuracy.high:.1%}) of "
            f"{accuracy.num_images} pictures held out"
        )


def _convert(arguments: argparse.Namespace) -> None:
    from ..evaluation.judges.q16_vectors import read_vectors, write_vectors

    found = read_vectors(arguments.convert)
    write_vectors(arguments.out, found.weights, found.probe, {**(found.metadata or {}), "numbers_sha256": found.sha256})
    if arguments.json:
        print(json.dumps({"vectors": str(arguments.out), "numbers_sha256": found.sha256}))
    else:
        print(f"{arguments.out}: two vectors of {found.weights.shape[1]} numbers, sha256 {found.sha256[:16]}")
