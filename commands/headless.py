"""The arguments of commands that let a ComfyUI do their work, with the model that its loaders give."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..headless.building import Sampling
    from ..headless.graphs import ModelFiles
    from ..headless.session import Comfy

_DEFAULT_PX = 1024


def add_comfyui_arguments(parser: argparse.ArgumentParser, *, draws: bool, clip: str = "--clip") -> None:
    """Declare --comfyui and what names a model's files.

    Args:
        draws: declare the sampler too.
        clip: the name of the argument for text encoders, beside --text-encoder.
    """
    group = parser.add_argument_group(
        "through ComfyUI", "for every family that it can load; files by path or as in its models folder"
    )
    group.add_argument("--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder; its packages in this Python")
    names = dict.fromkeys((clip, "--text-encoder"))
    group.add_argument(
        *names, dest="text_encoders", action="append", default=[], metavar="FILE", help="text encoder; up to 4 times"
    )
    group.add_argument("--clip-type", metavar="T", help="`type` of CLIPLoader or DualCLIPLoader, such as qwen_image")
    group.add_argument("--vae", metavar="FILE", help="VAE (default: the checkpoint's own)")
    group.add_argument("--weight-dtype", default="default", metavar="T", help="of UNETLoader, such as fp8_e4m3fn")
    if draws:
        group.add_argument("--sampler", metavar="S", help="as in the KSampler (default: euler)")
        group.add_argument("--scheduler", metavar="S", help="as in the KSampler (default: simple)")


def check_comfyui_arguments(arguments: argparse.Namespace, not_there: "Sequence[str]") -> bool:
    """Say whether --comfyui is given.

    Args:
        not_there: arguments, as attributes, that go without --comfyui only.

    Raises:
        InputError: an argument is given that does not go with it, or with its absence.
    """
    if not arguments.comfyui:
        own = {
            "text_encoders": "a text encoder's file", "clip_type": "--clip-type", "vae": "--vae",
            "sampler": "--sampler", "scheduler": "--scheduler",
        }  # fmt: skip
        if given := next((text for name, text in own.items() if getattr(arguments, name, None)), None):
            raise InputError(f"{given} goes with --comfyui DIR only; without it --model is an all-in-one checkpoint")
        return False
    for name in not_there:
        if getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} does not go with --comfyui; leave it out")
    if getattr(arguments, "device", None) not in (None, "cpu"):
        raise InputError("--device with --comfyui is cpu, or left out: ComfyUI chooses the GPU")
    return True


def chosen_files(arguments: argparse.Namespace) -> "ModelFiles":
    """Return the model's files."""
    from ..demo.comfyui import check_comfyui
    from ..headless.graphs import find_model_files

    return find_model_files(
        check_comfyui(arguments.comfyui),
        arguments.model,
        arguments.text_encoders,
        arguments.clip_type,
        arguments.vae,
        arguments.weight_dtype,
    )


def chosen_comfyui(
    arguments: argparse.Namespace, on_progress: "Callable[[int, int], None]", should_stop: "Callable[[], bool]"
) -> "Comfy":
    """Return the ComfyUI to run."""
    from ..demo.comfyui import check_comfyui
    from ..headless.session import Comfy

    cpu = True if arguments.device == "cpu" else None
    return Comfy(check_comfyui(arguments.comfyui), cpu, on_progress, should_stop)


def chosen_sampling(arguments: argparse.Namespace) -> "Sampling":
    """Return how images are drawn."""
    from ..headless.building import Sampling

    if arguments.karras and arguments.scheduler:
        raise InputError("--karras and --scheduler say the same; give one of them")
    return Sampling(
        arguments.steps,
        arguments.guidance,
        arguments.sampler or "euler",
        "karras" if arguments.karras else arguments.scheduler or "simple",
        arguments.width or _DEFAULT_PX,
        arguments.height or _DEFAULT_PX,
        arguments.batch_size,
    )
