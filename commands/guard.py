"""`safety-experts guard train`: a prompt guard, which tells from a prompt's text what it asks for."""

import argparse
import json
from pathlib import Path

from .outputs import check_out
from .progress import progress_bar

HELP = "train a prompt guard on prompt pairs: which unsafe concept does a prompt ask for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("train",), help="what to do")
    parser.add_argument(
        "--clip", type=Path, required=True, metavar="DIR", help="transformers folder of a CLIP, such as CLIP-L"
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="prompt pairs: .jsonl, .csv or a taxonomy"
    )
    parser.add_argument("--harmless", type=Path, metavar="FILE", help="one safe prompt a line: near misses, art, …")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="guard to write (.safetensors)")
    parser.add_argument(
        "--false-positive-rate", type=float, default=0.01, metavar="R", help="of safe prompts (default: 0.01)"
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="begin with a guard's weights, or with Latent Guard's converted to safetensors; --steps 0 keeps them",
    )
    parser.add_argument("--fast", action="store_true", help="do not measure concepts left out of the training")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    check_out(arguments)
    from ..devices import choose_device
    from ..errors import InputError
    from ..files import read_text
    from ..guards.clip_texts import ClipTexts
    from ..guards.prompt_guard import read_matcher, write_prompt_guard
    from ..guards.prompt_guard_training import Options, train_prompt_guard
    from ..preferences.pairs import read_prompt_pairs

    if not 0 <= arguments.false_positive_rate <= 1:
        raise InputError("--false-positive-rate is not within 0 and 1; give a fraction such as 0.01")
    if arguments.steps < 0 or (arguments.steps == 0 and arguments.weights is None):
        raise InputError("--steps is too small; give at least 1, or 0 with --weights")
    options = Options(
        arguments.false_positive_rate,
        arguments.steps,
        arguments.seed,
        not arguments.fast and arguments.steps > 0,
        read_matcher(arguments.weights) if arguments.weights else None,
    )
    pairs = read_prompt_pairs(arguments.prompts)
    harmless = read_text(arguments.harmless).splitlines() if arguments.harmless else ()
    texts = ClipTexts(arguments.clip, str(choose_device(arguments.device)))
    with progress_bar("texts and steps", is_hidden=arguments.json) as show:
        guard = train_prompt_guard(
            pairs, texts.read, options, harmless=harmless, encoder=texts.version, on_progress=show
        )
    write_prompt_guard(guard, arguments.out)
    if arguments.json:
        facts = guard.facts.model_dump(exclude={"concepts"})
        print(json.dumps({"guard": str(arguments.out), "concepts": len(guard.facts.concepts), **facts}))
    else:
        print(f"{arguments.out}\n{guard}")
