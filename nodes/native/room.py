"""How much memory a training step needs beside the weights, roughly: what is loaded of a MODEL leaves so much free."""

import math
import statistics

import comfy.model_management

from . import block_checkpoint, packed
from .adapters import Adapters

_SIZE_PX, _PX_PER_TOKEN, _TEXT_TOKENS = 1024, 16, 256
# A block's own activations, as many times its input: 24 to 44 are counted, of Ernie-Image 112
# (benchmarks/families_floor.py).
_BLOCK_PEAK = 45
_TIMES_DRAWING = 3


def room_bytes(patcher, adapters: Adapters, rows: int) -> float:
    """Return what a step over `rows` of 1024 px needs.

    Every block keeps its input, and one at a time all that it computes. Of a UNet, whose blocks differ in size: three
    times what ComfyUI reckons for drawing.
    """
    model = patcher.model
    if block_checkpoint.can_do_without(model.diffusion_model):
        side = _SIZE_PX // model.latent_format.spacial_downscale_ratio
        return _TIMES_DRAWING * patcher.memory_required([rows, model.latent_format.latent_channels, side, side])
    width = statistics.mode(adapter.down.shape[1] for adapter in adapters.by_name.values())
    tokens = (_SIZE_PX // _PX_PER_TOKEN) ** 2 + _TEXT_TOKENS
    blocks = block_checkpoint.blocks_of(model.diffusion_model)
    numbers = (len(blocks) + _BLOCK_PEAK) * rows * tokens * width
    if packed.is_gguf(patcher):  # a block's weights, unpacked and saved as a copy
        numbers += 2 * max(sum(math.prod(weight.shape) for weight in block.parameters()) for block in blocks)
    return numbers * comfy.model_management.dtype_size(model.get_dtype_inference())
