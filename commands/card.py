"""`safety-experts card`: an expert's model card."""

import argparse
import json
from pathlib import Path

HELP = "write the model card of an expert: what it is for, how it was made, and what it did to the numbers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="an expert, or any LoRA, as safetensors")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the card, such as card.md or README.md; without: printed"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="what `evaluate` wrote of this very file: its numbers, with intervals",
    )
    parser.add_argument("--license", default="other", metavar="ID", help="as model hubs spell it (default: other)")
    parser.add_argument("--base-model", metavar="NAME", help="the base model's name on a hub (default: by the family)")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def run(arguments: argparse.Namespace) -> None:
    from ..errors import InputError
    from ..evaluation.card_numbers import numbers_of
    from ..experts.card import card_markdown
    from ..files import write_atomically
    from ..training.watching.cards import PREVIEW_SUFFIX, make_card

    card = make_card(arguments.file)
    if arguments.evaluation:
        numbers = numbers_of(arguments.evaluation, card.file.sha256)
        if not numbers:
            raise InputError(f"{arguments.evaluation} did not measure this very file alone; evaluate --expert it there")
        card = make_card(arguments.file, numbers)
    if arguments.json:
        print(json.dumps(card.to_json(), indent=2, ensure_ascii=False))
    preview = arguments.file.with_suffix(PREVIEW_SUFFIX)
    # A hub shows a picture that lies beside the card.
    beside = preview.exists() and arguments.out and arguments.out.parent.resolve() == preview.parent.resolve()
    text = card_markdown(
        card, licence=arguments.license, base_model=arguments.base_model, picture=preview.name if beside else ""
    )
    if arguments.out:
        with write_atomically(arguments.out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif not arguments.json:
        print(text, end="")
