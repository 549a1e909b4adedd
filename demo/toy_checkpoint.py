"""Assembles the toy checkpoint, a single-file SD1.5 checkpoint that ComfyUI loads, from the shipped weights.

The trained parts come from `toy_weights.safetensors`, the rest is drawn again from its seed (see `toy_model`).
"""

import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
    try:
        with safe_open(target, "pt") as written, safe_open(WEIGHTS_PATH, "pt") as shipped:
            if (written.metadata() or {}).get(DIGEST_KEY) == shipped.metadata()[DIGEST_KEY]:
                return target
    except (FileNotFoundError, SafetensorError):
        pass
    return write_toy_checkpoint(target)


def write_toy_checkpoint(path: str | Path) -> Path:
    """Write the toy checkpoint (SD1.5 layout, float16, about 290 MB) and return its path.

    Raises:
        SafetyExpertsError: the disk is full, or this machine draws other untrained weights than the training did.
    """
    target = Path(path)
    parts, metadata = load_packed(WEIGHTS_PATH)
    tensors = assemble(parts["unet"], parts["autoencoder"])
    digest = digest_of(tensors)
    if digest != metadata[DIGEST_KEY]:
        raise SafetyExpertsError(
            f"the toy checkpoint assembled from {WEIGHTS_PATH} differs from the trained one; restore that file, or "
            "train again with python -m safety_experts.demo.train_toy"
        )
    header = {DIGEST_KEY: digest, "modelspec.title": "Safety Experts toy world", "format": "pt"}
    logger.info("writing the toy checkpoint to %s", target)
    with write_atomically(target) as temporary:
        save_file(tensors, temporary, header)
    return target
