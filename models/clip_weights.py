"""A CLIP text model inside a checkpoint, read under transformers' names whichever spelling the file has."""

import re

from torch import Tensor

from ..errors import InputError
from .weights_file import WeightsFile

_OPENCLIP_MODULES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPENCLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)\.?(weight|bias)$")
_OPENCLIP_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


class ClipWeights:
    """The weights of a text model under a prefix of a file.

    Args:
        prefix: empty or ending in a dot. Below it lie transformers' names, with or without `transformer.` and
            `text_model.` before them, or OpenCLIP's, which keep query, key and value in one tensor.
    """

    def __init__(self, file: WeightsFile, prefix: str):
        self.file, self.prefix = file, prefix
        # transformers name -> (key in the file, None for the whole tensor or which third of its rows)
        self._sources: dict[str, tuple[str, int | None]] = {}
        for key in file:
            if key.startswith(prefix):
                for name, third in _transformers_names(key[len(prefix) :]):
                    self._sources[name] = (key, third)

    def __bool__(self) -> bool:
        return "text_model.embeddings.token_embedding.weight" in self._sources

    @property
    def num_layers(self) -> int:
        return len({match[1] for name in self._sources if (match := re.search(r"\.layers\.(\d+)\.", name))})

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor by its transformers name.

        Raises:
            InputError: the file lacks it.
        """
        if name not in self._sources:
            raise InputError(
                f"{self.file.path}: the text encoder under {self.prefix or 'the root'} lacks {name}; download or save "
                "the file again"
            )
        key, third = self._sources[name]
        tensor = self.file.tensor(key)
        if third is not None:
            return tensor.chunk(3)[third]
        if key == f"{self.prefix}text_projection":
            return tensor.T.contiguous()  # OpenCLIP multiplies by it from the right
        return tensor


def _transformers_names(key: str) -> list[tuple[str, int | None]]:
    if key in _OPENCLIP_MODULES:
        return [(_OPENCLIP_MODULES[key], None)]
    if match := _OPENCLIP_LAYER.match(key):
        layer, part, kind = match.groups()
        base = f"text_model.encoder.layers.{layer}"
        if part == "attn.in_proj_":
            return [(f"{base}.self_attn.{letter}_proj.{kind}", third) for third, letter in enumerate("qkv")]
        return [(f"{base}.{_OPENCLIP_PARTS.get(part, part)}.{kind}", None)]
    name = key.removeprefix("transformer.")
    if name.startswith("text_projection"):
        return [("text_projection.weight", None)]
    return [(name if name.startswith("text_model.") else f"text_model.{name}", None)]
