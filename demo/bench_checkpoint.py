"""The bench world's checkpoint, assembled from packed weights, and where its parts lie.

The weights come from the long training of `train_bench`, in the cache or shipped beside this file.
"""

from pathlib import Path

from ..errors import InputError
from .bench_model import assemble
from .comfyui_source import cache_folder
from .toy_checkpoint import is_made_of, write_checkpoint

WEIGHTS_NAME = "bench_weights.safetensors"
CHECKPOINT_NAME = "safety_experts_bench.safetensors"

# What the bench model draws well with, for KSampler: dpmpp_2m on karras.
STEPS = 12
CFG = 3.0


def bench_folder() -> Path:
    """Return where the training keeps its state and the checkpoint is cached, unless told otherwise."""
    return cache_folder() / "bench-world"


def ensure_bench_checkpoint(folder: Path | None = None) -> Path:
    """Return the bench checkpoint's path, writing it first when it is missing or of other weights.

    Args:
        folder: holds the weights, unless they are shipped, and the checkpoint; `bench_folder()` by default.

    Raises:
        InputError: the model has not been trained yet.
    """
    folder = folder or bench_folder()
    candidates = (folder / WEIGHTS_NAME, Path(__file__).with_name(WEIGHTS_NAME))
    weights = next((path for path in candidates if path.is_file()), None)
    if weights is None:
        raise InputError(f"no {WEIGHTS_NAME} in {folder}; train it with python -m safety_experts.demo.train_bench")
    target = folder / CHECKPOINT_NAME
    return target if is_made_of(target, weights) else write_checkpoint(target, weights, "bench", assemble)
