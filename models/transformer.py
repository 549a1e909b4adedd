"""Building a diffusers SD3 or FLUX.1 transformer of any layout that the weights ask for."""

from typing import Any

import torch
from torch import Tensor, nn

from .transformer_keys import TransformerLayout, native_weight, transformer_config
from .weights_file import WeightsFile, fill


def build_transformer(layout: TransformerLayout) -> nn.Module:
    """Return a diffusers transformer of this layout on the meta device (no weights yet)."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel  # imported where needed: it takes seconds

    model_class: Any = FluxTransformer2DModel if layout.family == "flux" else SD3Transformer2DModel
    with torch.device("meta"):
        return model_class(**transformer_config(layout))


def load_transformer(
    file: WeightsFile, prefix: str, layout: TransformerLayout, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Build the transformer and fill it from native keys under `prefix`.

    Raises:
        InputError: a weight is missing or has another shape than the layout asks for.
    """

    def read(key: str) -> Tensor:
        weight = native_weight(key, layout)
        native = prefix + weight.key
        if native.endswith("_norm.weight") and native not in file:
            native = native.removesuffix("weight") + "scale"  # FLUX's norms as first published
        tensor = file.tensor(native)
        if weight.rows is not None:
            return tensor[weight.rows].clone()  # a view would keep the other rows in memory
        return torch.cat(tensor.chunk(2)[::-1]) if weight.swapped else tensor

    transformer = build_transformer(layout)
    fill(transformer, read, dtype, device, file.path)
    return transformer
