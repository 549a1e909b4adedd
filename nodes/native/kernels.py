"""ComfyUI's kernels without a backward pass, and plain torch in their place while training."""

import contextlib
from collections.abc import Iterator

import comfy.model_management
import comfy.ops
import comfy.quant_ops

try:  # a package of its own, which ComfyUI installs; its plain torch functions are differentiable
    from comfy_kitchen.backends import eager
except ImportError:
    eager = None

_NAMES: tuple[str, ...] = ("apply_rope", "apply_rope1", "apply_rope_split_half", "apply_rope_split_half1")
_NAMES += ("rms_rope", "rms_rope1", "rms_rope_split_half", "rms_rope_split_half1", "adaln", "rms_adaln")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, a cancel raises in no operation: the trainer asks for it between steps, and saves what there is."""
    run_every_op = comfy.ops.run_every_op
    comfy.ops.run_every_op = lambda: None
    try:
        yield
    finally:
        comfy.ops.run_every_op = run_every_op


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Inside, ComfyUI's models compute with what autograd can follow (Anima's rotation has no switch of its own).

    Weights that come from RAM come into memory of their own: the streams that bring them while the layer before still
    computes write into buffers that are used again, and autograd needs a weight until the block's way back is done.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    names = [name for name in _NAMES if hasattr(kitchen, name) and hasattr(eager, name)]
    before = {name: getattr(kitchen, name) for name in names}
    was_training, num_streams = comfy.model_management.in_training, comfy.model_management.NUM_STREAMS
    comfy.model_management.in_training, comfy.model_management.NUM_STREAMS = True, 0
    for name in names:
        setattr(kitchen, name, getattr(eager, name))
    try:
        with uninterrupted():
            yield
    finally:
        comfy.model_management.in_training, comfy.model_management.NUM_STREAMS = was_training, num_streams
        for name, function in before.items():
            setattr(kitchen, name, function)
