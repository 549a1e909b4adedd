"""Running out of memory, as every device puts it, and what to do about it."""

import contextlib
from collections.abc import Iterator

import torch

from ..errors import SafetyExpertsError

REMEDY = (
    "halve batch_size and double accumulation_steps, set gradient_checkpointing=true, take the low-vram recipe, "
    "or close other programs that use the device"
)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an error of its own; CPU and MPS raise a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in ("out of memory", "can't allocate"))
    )


@contextlib.contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Raise one line with the remedy where the device has run out of memory.

    Raises:
        SafetyExpertsError: instead of what PyTorch raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SafetyExpertsError(f"out of memory: {REMEDY}; resume goes on from the last saved state") from error
