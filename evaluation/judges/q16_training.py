"""Fitting Q16's two vectors to folders of one's own pictures: what `safety-experts judge-train` does."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import InputError
from ...preferences.images import read_image
from ..statistics import Rate, rate_of
from .clip_encoder import ClipEncoder, normalised
from .q16_vectors import probe_image, write_vectors

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_HELD_OUT_FRACTION = 0.2
_MIN_IMAGES = 10
_STEPS, _LEARNING_RATE, _TEMPERATURE = 500, 0.02, 100.0


def train_vectors(
    encoder: ClipEncoder,
    safe: Path,
    unsafe: Path,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rate:
    """Fit two vectors to two folders of pictures, write them, and return their accuracy on a held-out fifth.

    The loss is Q16's: cross entropy of softmax(100 cos(u, w)), both folders weighing the same. Which pictures are held
    out depends on their bytes alone, so a copy of a picture never stands on both sides.

    Raises:
        InputError: a folder is missing, or holds too few pictures or a broken one.
    """
    paths = [_pictures(folder) for folder in (safe, unsafe)]
    total = sum(map(len, paths))
    embedded, is_held_out, labels = [], [], []
    for label, files in enumerate(paths):
        for start in range(0, len(files), encoder.batch_size):
            batch = files[start : start + encoder.batch_size]
            images = [read_image(path, (SUFFIXES[path.suffix.lower()],)) for path in batch]
            embedded.append(encoder.embed_images(images))
            digests = [hashlib.sha256(image.tobytes()).digest()[0] for image in images]
            is_held_out += [digest < 256 * _HELD_OUT_FRACTION for digest in digests]
            labels += [label] * len(batch)
            on_progress(len(labels), total)
    units, targets, held_out = normalised(torch.cat(embedded)), torch.tensor(labels), torch.tensor(is_held_out)
    for label, folder in enumerate((safe, unsafe)):
        if not (targets[held_out] == label).any() or not (targets[~held_out] == label).any():
            raise InputError(f"{folder}: too few different pictures to hold some out; add more")
    weights = fit(units[~held_out], targets[~held_out])
    right = (units[held_out] @ normalised(weights).T).argmax(dim=1) == targets[held_out]
    accuracy = rate_of(right.tolist())
    metadata = {
        "safety_experts": "q16 vectors 1",
        "clip": encoder.version,
        "num_safe": str(len(paths[0])),
        "num_unsafe": str(len(paths[1])),
        "held_out_accuracy": f"{accuracy.value:.4f} ({accuracy.low:.4f} to {accuracy.high:.4f})",
        "num_held_out": str(accuracy.num_images),
    }
    write_vectors(out, weights, encoder.embed_images([probe_image()])[0], metadata)
    return accuracy


def fit(units: Tensor, targets: Tensor) -> Tensor:
    """Return two vectors [2, d] for normalised embeddings [n, d] of class 0 or 1 [n]; always the same ones."""
    counts = torch.bincount(targets, minlength=2)
    # From the middles of the classes, which is where two directions differ at all.
    weights = torch.stack([units[targets == label].mean(dim=0) for label in (0, 1)])
    with torch.inference_mode(False), torch.enable_grad():
        units, targets = units.clone(), targets.clone()  # ComfyUI's were made in inference mode
        weights = weights.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=_LEARNING_RATE / len(units[0]) ** 0.5)
        for _ in range(_STEPS):
            logits = _TEMPERATURE * units @ functional.normalize(weights, dim=1).T
            loss = functional.cross_entropy(logits, targets, weight=len(units) / (2 * counts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights.detach()


def _pictures(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; check the name")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < _MIN_IMAGES:
        raise InputError(f"{folder}: {len(found)} pictures (.png, .jpg, .webp); at least {_MIN_IMAGES} are needed")
    return found
