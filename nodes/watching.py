"""What a training shows beside its curves: the run page, its samples as batches, the expert's preview picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..evaluation.card_numbers import first_numbers
from ..experts.card import CardNumber
from ..files import write_atomically
from ..training.watching.card_routes import add_card_routes
from ..training.watching.cards import PREVIEW_SUFFIX, pictures_of
from ..training.watching.routes import add_run_routes
from ..training.watching.run_files import sample_path
from . import host, pictures

_CELL_PX = 256


def register_pages() -> None:
    """Put the run page and the experts' cards into the running server; a program that only imports has none."""
    from server import PromptServer

    if server := getattr(PromptServer, "instance", None):
        add_run_routes(server.routes, host.Runs())
        add_card_routes(server.routes, _Experts(), _numbers_of)


class _Experts:
    """ComfyUI's loras folders, as the page of experts asks for them."""

    def names(self) -> list[str]:
        return host.expert_names()

    def path(self, name: str) -> Path:
        return host.expert_path(name)


def _numbers_of(sha256: str) -> list[CardNumber]:
    return first_numbers(host.evaluation_folders(), sha256)


def first_and_last_samples(expert: Path) -> list[list[Image.Image]]:
    """Return what was drawn first and last in the training of an expert, by prompt, the unsafe one first."""
    return [
        [_read(sample_path(expert, step, number)) for number in range(count)] for step, count in pictures_of(expert)
    ]


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    """Return [n, h, w, 3] in 0..1."""
    return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32) / 255) for image in images])


def write_preview(expert: Path, *, is_blurred: bool) -> None:
    """Write the picture that LoRA managers show: a row a prompt, before and after; does nothing without samples.

    Args:
        is_blurred: also blur what the expert draws for the unsafe prompt; what the model drew before is always blurred.
    """
    samples = first_and_last_samples(expert)
    if len(samples) < 2:
        return
    rows = list(zip(*samples, strict=False))
    together = Image.new("RGB", (2 * _CELL_PX, len(rows) * _CELL_PX))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            is_unsafe = row == 0 and len(rows) > 1
            if is_unsafe and (is_blurred or column == 0):
                image = pictures.blurred(image)
            together.paste(image.resize((_CELL_PX, _CELL_PX)), (column * _CELL_PX, row * _CELL_PX))
    with write_atomically(expert.with_suffix(PREVIEW_SUFFIX)) as temporary:
        together.save(temporary)


def _read(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        return image.convert("RGB")
