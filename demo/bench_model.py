"""The bench world's model: a two-level SD1.5 UNet, the toy's text model with planted words, and a TAESD.

Attention is on the coarser level only, where a picture of 128 px has 64 places: three quarters of the cost gone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.tokenizer import load_tokenizer
from ..models.unet_keys import UNetLayout
from ..toy.bench_world import planted_words
from .comfyui import find_comfyui
from .toy_model import assemble as assemble_toy
from .toy_model import plant_words, seeded_text_model

LAYOUT = UNetLayout(
    model_channels=320,
    channel_mult=(1, 1),
    input_depths=((0,), (1,)),
    output_depths=((0, 0), (1, 1)),
    middle_depth=None,
    context_dim=768,
)
TOKENIZER_FOLDER = ("comfy", "sd1_tokenizer")  # in ComfyUI


def assemble(unet: Mapping[str, torch.Tensor], autoencoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors in SD1.5's layout, float16, from the two trained state dicts."""
    text_model = seeded_text_model()
    plant_words(text_model, planted_words(), tokenizer())
    return assemble_toy(unet, autoencoder, LAYOUT, text_model)


def tokenizer() -> Any:
    """Return CLIP's tokenizer as ComfyUI ships it."""
    return load_tokenizer(find_comfyui().joinpath(*TOKENIZER_FOLDER))
