"""How a command draws images: the arguments that `evaluate` and `dataset build` share."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..evaluation.drawing import Generation


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare size, steps, guidance, precision, batch size, device and tokenizer; `chosen_generation` reads them."""
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5, help="where a prompt has none of its own")
    parser.add_argument("--width", type=int, metavar="PX", help="default: what the family is made for")
    parser.add_argument("--height", type=int, metavar="PX")
    parser.add_argument("--karras", action="store_true", help="Karras noise levels")
    parser.add_argument("--negative", default="", metavar="TEXT", help="negative prompt")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 else")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N")
    parser.add_argument("--device", help="torch device (default: what accelerate chooses)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")


def chosen_generation(arguments: argparse.Namespace, family: str, device: "torch.device") -> "Generation":
    """Return how images are drawn; what was not given is what the model's family and the device are made for."""
    from ..evaluation.drawing import Generation, default_size_px

    side = default_size_px(family)
    return Generation(
        arguments.steps,
        arguments.guidance,
        arguments.width or side,
        arguments.height or side,
        arguments.karras,
        arguments.negative,
        arguments.precision or ("fp32" if device.type == "cpu" else "bf16"),
    )
