"""Assembles the toy checkpoint, a single-file SD1.5 checkpoint that ComfyUI loads, from the shipped weights.

The trained parts come from `toy_weights.safetensors`, the rest is drawn again from its seed (see `toy_model`).
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import SafetyExpertsError
from ..files import write_atomically
from .packed_weights import load_packed
from .toy_model import assemble, digest_of

logger = logging.getLogger(__name__)

WEIGHTS_PATH = Path(__file__).with_name("toy_weights.safetensors")
CHECKPOINT_NAME = "safety_experts_toy.safetensors"

# What the toy model draws well with, for KSampler.
SAMPLER_NAME = "dpmpp_2m"
SCHEDULER = "karras"
STEPS = 12
CFG = 3.0

DIGEST_KEY = "safety_experts_toy_sha256"


def default_checkpoint_path() -> Path:
    """Return where the toy checkpoint is cached: `$XDG_CACHE_HOME` or `~/.cache`, never the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "safety-experts" / CHECKPOINT_NAME


def ensure_toy_checkpoint(path: str | Path | None = None) -> Path:
    """Return the toy checkpoint's path, writing it first when it is missing or of other weights than the shipped.

    Args:
        path: where it should be; `default_checkpoint_path()` by default.
    """
    target = Path(path) if path is not None else default_checkpoint_path()
    return target if is_made_of(target, WEIGHTS_PATH) else write_toy_checkpoint(target)


def is_made_of(path: Path, weights: Path) -> bool:
    """Return whether a checkpoint is there and was assembled from these packed weights."""
    try:
        with safe_open(path, "pt") as written, safe_open(weights, "pt") as packed:
            return (written.metadata() or {}).get(DIGEST_KEY) == packed.metadata()[DIGEST_KEY]
    except (FileNotFoundError, SafetensorError):
        return False


def write_toy_checkpoint(path: str | Path) -> Path:
    """Write the toy checkpoint (SD1.5 layout, float16, about 290 MB) and return its path.

    Raises:
        SafetyExpertsError: the disk is full, or this machine draws other untrained weights than the training did.
    """
    return write_checkpoint(Path(path), WEIGHTS_PATH, "toy", assemble)


def write_checkpoint(target: Path, weights: Path, world: str, assemble: Callable[..., dict[str, Tensor]]) -> Path:
    """Write a checkpoint from packed weights and return its path.

    Args:
        target: the file to write.
        weights: of `packed_weights.save_packed`, parts "unet" and "autoencoder".
        world: "toy" or "bench".
        assemble: takes the two parts and gives the checkpoint's tensors.

    Raises:
        SafetyExpertsError: as `write_toy_checkpoint`.
    """
    parts, metadata = load_packed(weights)
    tensors = assemble(parts["unet"], parts["autoencoder"])
    digest = digest_of(tensors)
    if digest != metadata[DIGEST_KEY]:
        raise SafetyExpertsError(
            f"the {world} checkpoint assembled from {weights} differs from the trained one; restore that file, or "
            f"train again with python -m safety_experts.demo.train_{world}"
        )
    header = {DIGEST_KEY: digest, "modelspec.title": f"Safety Experts {world} world", "format": "pt"}
    logger.info("writing the %s checkpoint to %s", world, target)
    with write_atomically(target) as temporary:
        save_file(tensors, temporary, header)
    return target
