"""Are these LoRAs made for one model? Their layers say it, also where their metadata say nothing."""

import re
from collections.abc import Sequence

from ..errors import InputError
from .expert import Expert
from .keys import TRANSFORMER_PREFIX, UNET_PREFIX

_UNETS, _TRANSFORMERS = {"sd15", "sd20", "sdxl"}, {"sd3", "flux"}
_OTHERS = {"flux2", "chroma", "z-image", "lumina2", "qwen-image", "wan2.1", "wan2.2", "hidream", "another family"}
_ALL = _UNETS | _TRANSFORMERS | _OTHERS
_UNET_NAME = (
    rf"{UNET_PREFIX}_(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embed|add_embed|label_emb|"
    r"input_blocks|output_blocks|middle_block)"
)
# What only some of the families have, by the name of a layer.
_SIGNS = (
    (re.compile(_UNET_NAME), _UNETS),
    (re.compile(rf"(?!{_UNET_NAME}){UNET_PREFIX}_"), _TRANSFORMERS | _OTHERS),  # ComfyUI's own names
    (re.compile(rf"{TRANSFORMER_PREFIX}_"), _TRANSFORMERS),
    (re.compile(rf"{UNET_PREFIX}_joint_blocks_"), {"sd3"}),
    (re.compile(rf"{UNET_PREFIX}_(double|single)_blocks_"), {"flux", "flux2", "chroma", "another family"}),
    (re.compile(rf"{UNET_PREFIX}_(down_blocks_0|up_blocks_3)_attentions_"), {"sd15", "sd20"}),
    (re.compile(rf"{UNET_PREFIX}_(add_embedding|.*_transformer_blocks_[1-9])"), {"sdxl"}),
    (re.compile(rf"{TRANSFORMER_PREFIX}_single_transformer_blocks_"), {"flux"}),
)
# Width of the text that cross-attention reads -> families.
_CONTEXT = {768: {"sd15"}, 1024: {"sd20"}, 2048: {"sdxl"}}


def possible_families(expert: Expert) -> set[str]:
    """Return the families that an expert's metadata and layers allow; all of them where its layers fit none.

    A small model of a family's shape, such as the toy, counts as that family.
    """
    families = set(_ALL)
    named = expert.info.base_checkpoint.family
    if named in families or (named and not any(re.match(_UNET_NAME, name) for name in expert.layers)):
        return {named}
    for name, layer in expert.layers.items():
        for sign, owners in _SIGNS:
            if sign.match(name):
                families &= owners
        if name.endswith(("_attn2_to_k", "_attn2_to_v")):
            families &= _CONTEXT.get(layer.weight_shape[1], families)
    return families or set(_ALL)


def check_one_model(experts: Sequence[Expert]) -> None:
    """Raise an InputError unless all experts can be of one model: by their family, and by every layer that two have."""
    first, families = experts[0], [possible_families(expert) for expert in experts]
    for expert, own in zip(experts[1:], families[1:], strict=True):
        if not own & families[0]:
            raise InputError(
                f"{first.name} is made for {_names(families[0])} but {expert.name} for {_names(own)}; "
                "only LoRAs of one model family go together"
            )
    shapes: dict[str, tuple[Expert, tuple[int, ...]]] = {}
    for expert in experts:
        for name, layer in expert.layers.items():
            other, shape = shapes.setdefault(name, (expert, layer.weight_shape))
            if shape != layer.weight_shape:
                raise InputError(
                    f"layer {name} is {list(shape)} in {other.name} but {list(layer.weight_shape)} in {expert.name}; "
                    "only LoRAs of one model family go together"
                )


def _names(families: set[str]) -> str:
    return " or ".join(sorted(families))
