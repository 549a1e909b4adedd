"""What `evaluate` measures of finished pictures beside the judges: drift and fit by a CLIP, one's own scorers, FID."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..evaluation.inception import Inception, Reference
    from ..evaluation.judges.clip_encoder import ClipFolder
    from ..evaluation.plugins import Plugin


@dataclass(frozen=True)
class Measures:
    """The measures that were asked for, loaded."""

    plugins: "list[Plugin]"
    clip: "ClipFolder | None"
    inception: "Inception | None"
    reference: "Reference | None"

    def __bool__(self) -> bool:
        return bool(self.plugins or self.clip or self.inception)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --scorer, --clip, --inception and --fid-reference; `load_measures` reads them."""
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="[NAME=]FILE.py",
        help="measure with code of your own; it is run",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="CLIP in a transformers folder: drift, CLIPScore, KID, CMMD"
    )
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="FID by torch-fidelity, from 2,048 safe prompts on; its weights"
    )
    parser.add_argument("--fid-reference", type=Path, metavar="DIR", help="also FID to the pictures in DIR")


def load_measures(arguments: argparse.Namespace, device: str, num_safe: int | None = None) -> Measures:
    """Load what was asked for.

    Args:
        num_safe: pictures of safe prompts an arm will have; None: they are there and are counted when measured.

    Raises:
        InputError: a file is missing or wrong, or FID was asked for and there will be too few pictures.
    """
    from ..evaluation.inception import Inception, Reference, check_enough
    from ..evaluation.judges.clip_encoder import ClipFolder
    from ..evaluation.plugins import load_plugins

    if arguments.fid_reference and not arguments.inception:
        raise InputError("--fid-reference goes with --inception FILE, whose features are compared")
    plugins = load_plugins(arguments.scorer)
    reference = Reference.of_folder(arguments.fid_reference) if arguments.fid_reference else None
    if arguments.inception and num_safe is not None:
        check_enough(num_safe, reference)
    return Measures(
        plugins,
        ClipFolder(arguments.clip, device) if arguments.clip else None,
        Inception(arguments.inception, device) if arguments.inception else None,
        reference,
    )


def measure(folder: Path, measures: Measures) -> bool:
    """Measure the pictures of a finished evaluation; False when it was stopped, with what was measured kept.

    Raises:
        InputError: the folder holds no evaluation, or a picture is missing or broken.
        SafetyExpertsError: a scorer failed.
    """
    from ..evaluation.inception import measure_fid
    from ..evaluation.plan import add_note
    from ..evaluation.plugins import measure_with
    from ..evaluation.quality import measure_quality
    from ..evaluation.samples import FILE_NAME, SampleStore, read_samples
    from .progress import progress_bar
    from .stopping import stop_when_asked

    if not measures:
        return True
    order = list(dict.fromkeys(sample.key for sample in read_samples(folder / FILE_NAME)))
    store = SampleStore(folder)
    store.finish(order)
    finished = True
    with stop_when_asked() as should_stop:
        for plugin in measures.plugins:
            with progress_bar(plugin.name) as show:
                finished = finished and measure_with(folder, plugin, on_progress=show, should_stop=should_stop)
        if measures.plugins and finished:
            add_note(folder, "scorers", ", ".join(f"{plugin.name} {plugin.version}" for plugin in measures.plugins))
        if measures.clip and finished:
            with progress_bar("measuring") as show:
                finished = measure_quality(folder, measures.clip, on_progress=show, should_stop=should_stop)
        if measures.inception and finished:
            with progress_bar("FID") as show:
                finished = measure_fid(
                    folder, measures.inception, measures.reference, on_progress=show, should_stop=should_stop
                )
    store.finish(order)
    return finished
