"""`safety-experts dataset build`: draw both images of every prompt pair with one's own model, outside ComfyUI."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .headless import (
    add_comfyui_arguments,
    check_comfyui_arguments,
    chosen_comfyui,
    chosen_files,
    chosen_sampling,
)

if TYPE_CHECKING:
    from ..evaluation.drawing import Generation
    from ..models.checkpoint import Checkpoint
    from ..preferences.dataset import DatasetInfo, ImageToImage, PreferenceDataset

# What the Generate node of a ComfyUI does not do: judges look at the finished dataset (`dataset judge`).
_NOT_IN_COMFYUI = ("judge", "set", "precision", "tokenizer")
_EPILOG = (
    "Several GPUs: start it with `accelerate launch` or `torchrun`; each process draws its share; the folder is the "
    "one that a single process makes. Killed or stopped, the same command goes on."
)


def add_arguments(verbs) -> None:
    """Declare the verb `build` among those of `dataset`."""
    text = "draw both images of every prompt pair with your own model"
    parser = verbs.add_parser("build", help=text, description=text, epilog=_EPILOG)
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="prompt pairs: .jsonl, .csv, .yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="dataset folder, new or to add to")
    parser.add_argument("--images-per-prompt", type=int, default=1, metavar="N", help="pairs a prompt, of N seeds")
    parser.add_argument(
        "--best-of", type=int, default=1, metavar="K", help="draw K seeds and keep the one the judges agree with most"
    )
    parser.add_argument(
        "--image-to-image",
        type=float,
        metavar="DENOISE",
        help="draw the safe image from the unsafe one (DUO): how much of it anew, above 0 and below 1, such as 0.75",
    )
    parser.add_argument(
        "--negate-unsafe", action="store_true", help="with --image-to-image: the unsafe prompt is negative, as in DUO"
    )
    from .drawing import add_drawing_arguments
    from .judging import add_judge_arguments

    add_judge_arguments(parser)
    add_drawing_arguments(parser)
    add_comfyui_arguments(parser, draws=True)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(work=_build)


def _build(arguments: argparse.Namespace) -> None:
    for name in ("images_per_prompt", "best_of", "batch_size"):
        if not 1 <= getattr(arguments, name) <= 10_000:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1 (and at most 10000)")
    if (arguments.best_of > 1) != bool(arguments.judge):
        raise InputError("--best-of and --judge go together: judges choose among the K seeds")
    how = _image_to_image(arguments)
    if check_comfyui_arguments(arguments, _NOT_IN_COMFYUI):
        _build_in_comfyui(arguments, how)
        return
    from ..evaluation.building import JudgePanel, Share, build_dataset, independently, several_seeds
    from ..evaluation.drawing import drawer_of
    from ..models.checkpoint import load_checkpoint
    from ..preferences.pairs import read_prompt_pairs
    from .drawing import chosen_generation
    from .judging import chosen_judges
    from .progress import progress_bar
    from .sharing import this_process, wait_for_all
    from .stopping import stop_when_asked

    pairs = several_seeds(read_prompt_pairs(arguments.prompts), arguments.images_per_prompt)
    checkpoint = load_checkpoint(arguments.model, tokenizer_folder=arguments.tokenizer)
    rank, count, device = this_process(arguments.device)
    generation = chosen_generation(arguments, checkpoint.family, device)
    panel = JudgePanel(chosen_judges(arguments), str(device)) if arguments.judge else None
    with (
        stop_when_asked() as should_stop,
        progress_bar("pairs", is_hidden=arguments.json or rank > 0) as show,
        drawer_of(checkpoint, {"base": ()}, generation, device) as drawer,
    ):
        dataset = build_dataset(
            pairs,
            arguments.out,
            _describe(checkpoint, generation, arguments, how),
            (lambda batch: drawer.draw_chosen_from_rejected(batch, how))
            if how
            else independently(lambda prompts, seeds: drawer.draw("base", prompts, seeds, None)),
            batch_size=arguments.batch_size,
            best_of=arguments.best_of,
            panel=panel,
            share=Share(rank, count, wait_for_all) if count > 1 else None,
            on_progress=show,
            should_stop=should_stop,
        )
    if rank:
        return
    _print_result(dataset, arguments)


def _build_in_comfyui(arguments: argparse.Namespace, how: "ImageToImage | None") -> None:
    from ..evaluation.building import several_seeds
    from ..headless.building import build_in_comfyui
    from ..preferences.pairs import read_prompt_pairs
    from .progress import progress_bar
    from .stopping import stop_when_asked

    pairs = several_seeds(read_prompt_pairs(arguments.prompts), arguments.images_per_prompt)
    files, sampling = chosen_files(arguments), chosen_sampling(arguments)
    with stop_when_asked() as should_stop, progress_bar("image steps", is_hidden=arguments.json) as show:
        comfy = chosen_comfyui(arguments, show, should_stop)
        dataset = build_in_comfyui(comfy, files, pairs, arguments.out, sampling, arguments.negative, how)
    _print_result(dataset, arguments)


def _print_result(dataset: "PreferenceDataset", arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"folder": str(dataset.folder), "pairs": len(dataset.pairs)}))
    else:
        print(f"{dataset.folder}: {len(dataset.pairs)} pairs")


def _image_to_image(arguments: argparse.Namespace) -> "ImageToImage | None":
    from ..preferences.dataset import ImageToImage

    if arguments.image_to_image is None:
        if arguments.negate_unsafe:
            raise InputError("--negate-unsafe needs --image-to-image DENOISE; add it, or leave --negate-unsafe out")
        return None
    how = ImageToImage(arguments.image_to_image, arguments.negate_unsafe)
    if arguments.steps / how.denoise > 1000:
        raise InputError(f"--image-to-image {how.denoise} is too little for {arguments.steps} steps; use fewer")
    return how


def _describe(
    checkpoint: "Checkpoint", generation: "Generation", arguments: argparse.Namespace, how: "ImageToImage | None"
) -> "DatasetInfo":
    from ..checkpoint_id import CheckpointId
    from ..preferences.dataset import DatasetInfo

    base = CheckpointId(name=checkpoint.name, sha256=checkpoint.sha256, family=checkpoint.family)
    drawn = generation.to_json() | {"program": "safety-experts dataset build", "batch_size": arguments.batch_size}
    if arguments.best_of > 1:
        drawn |= {"best_of": arguments.best_of, "judges": ", ".join(arguments.judge)}
    return DatasetInfo(base, drawn, prompt_source=arguments.prompts.name, image_to_image=how)
