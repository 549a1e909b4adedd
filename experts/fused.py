"""Transformer layers that ComfyUI names its own way, and often keeps in one piece, under diffusers' names: exactly.

A fused layer's LoRA is split by rows: every part has the same A and its own rows of B. Nothing is computed, so the
parts' changes are, number for number, the rows of the whole change.

Source: comfy/utils.py flux_to_diffusers, mmdit_to_diffusers, z_image_to_diffusers; diffusers' models' state dicts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from .expert import Expert, LoraLayer
from .info import ExpertInfo, RankBlockEntry
from .keys import TRANSFORMER_PREFIX, UNET_PREFIX, kohya_name

Rows = Sequence[int]  # of each part, in order
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class _Parts:
    """A layer's paths in diffusers' model, and how many rows belong to each; None: all to the only one."""

    paths: tuple[str, ...]
    rows: Rows | None = None


_Rule = tuple[re.Pattern, Callable[[re.Match, int, int], _Parts]]  # (match, rows, columns)


def _rule(pattern: str, parts: Callable[[re.Match, int, int], _Parts]) -> _Rule:
    return re.compile(f"{UNET_PREFIX}_{pattern}"), parts


def _renamed(template: str, words: Mapping[str, str]) -> Callable[[re.Match, int, int], _Parts]:
    """Return parts of one path: `template` with the first group, then the word of the second."""
    return lambda match, rows, columns: _Parts((f"{template.format(match[1])}.{words[match[2]]}",))


def _thirds(block: str, names: Sequence[str], rows: int) -> _Parts:
    return _Parts(tuple(f"{block}.{name}" for name in names), (rows // 3,) * 3)


def _linear1(match: re.Match, rows: int, columns: int) -> _Parts:
    block = f"single_transformer_blocks.{match[1]}"
    paths = (*(f"{block}.attn.{name}" for name in _QKV), f"{block}.proj_mlp")
    return _Parts(paths, (columns,) * 3 + (rows - 3 * columns,))


def _grouped(match: re.Match, rows: int, columns: int) -> _Parts:
    """Lumina 2: fewer keys and values than queries."""
    names = tuple(f"{match[1]}.{match[2]}.attn.{name}" for name in _QKV)
    return _Parts(names, (columns, (rows - columns) // 2, (rows - columns) // 2))


_DOUBLE = (
    _rule(
        r"double_blocks_(\d+)_(img|txt)_attn_qkv",
        lambda m, rows, _: _thirds(f"transformer_blocks.{m[1]}.attn", _QKV if m[2] == "img" else _ADDED, rows),
    ),
    _rule(
        r"double_blocks_(\d+)_(img|txt)_attn_proj",
        _renamed("transformer_blocks.{}.attn", {"img": "to_out.0", "txt": "to_add_out"}),
    ),
)
_FLUX = (
    *_DOUBLE,
    _rule(
        r"double_blocks_(\d+)_((?:img|txt)_m(?:lp_0|lp_2|od_lin))",
        _renamed(
            "transformer_blocks.{}",
            {
                "img_mlp_0": "ff.net.0.proj",
                "img_mlp_2": "ff.net.2",
                "img_mod_lin": "norm1.linear",
                "txt_mlp_0": "ff_context.net.0.proj",
                "txt_mlp_2": "ff_context.net.2",
                "txt_mod_lin": "norm1_context.linear",
            },
        ),
    ),
    _rule(r"single_blocks_(\d+)_linear1", _linear1),
    _rule(
        r"single_blocks_(\d+)_(linear2|modulation_lin)",
        _renamed("single_transformer_blocks.{}", {"linear2": "proj_out", "modulation_lin": "norm.linear"}),
    ),
)
_FLUX2 = (
    *_DOUBLE,
    _rule(
        r"double_blocks_(\d+)_((?:img|txt)_mlp_[02])",
        _renamed(
            "transformer_blocks.{}",
            {
                "img_mlp_0": "ff.linear_in",
                "img_mlp_2": "ff.linear_out",
                "txt_mlp_0": "ff_context.linear_in",
                "txt_mlp_2": "ff_context.linear_out",
            },
        ),
    ),
    _rule(
        r"single_blocks_(\d+)_(linear[12])",
        _renamed("single_transformer_blocks.{}.attn", {"linear1": "to_qkv_mlp_proj", "linear2": "to_out"}),
    ),
)
_SD3 = (
    _rule(
        r"joint_blocks_(\d+)_(x|context)_block_(attn2?)_qkv",
        lambda m, rows, _: _thirds(f"transformer_blocks.{m[1]}.{m[3]}", _QKV if m[2] == "x" else _ADDED, rows),
    ),
    _rule(
        r"joint_blocks_(\d+)_(x_block_attn2?_proj|context_block_attn_proj|(?:x|context)_block_mlp_fc[12])",
        _renamed(
            "transformer_blocks.{}",
            {
                "x_block_attn_proj": "attn.to_out.0",
                "x_block_attn2_proj": "attn2.to_out.0",
                "context_block_attn_proj": "attn.to_add_out",
                "x_block_mlp_fc1": "ff.net.0.proj",
                "x_block_mlp_fc2": "ff.net.2",
                "context_block_mlp_fc1": "ff_context.net.0.proj",
                "context_block_mlp_fc2": "ff_context.net.2",
            },
        ),
    ),
)
_LAYERS = r"(layers|noise_refiner|context_refiner)_(\d+)"
_Z_IMAGE = (
    _rule(rf"{_LAYERS}_attention_qkv", lambda m, rows, _: _thirds(f"{m[1]}.{m[2]}.attention", _QKV, rows)),
    _rule(rf"{_LAYERS}_attention_out", lambda m, *_: _Parts((f"{m[1]}.{m[2]}.attention.to_out.0",))),
    _rule(rf"{_LAYERS}_feed_forward_(w[123])", lambda m, *_: _Parts((f"{m[1]}.{m[2]}.feed_forward.{m[3]}",))),
)
_LUMINA2 = (
    _rule(rf"{_LAYERS}_attention_qkv", _grouped),
    _rule(rf"{_LAYERS}_attention_out", lambda m, *_: _Parts((f"{m[1]}.{m[2]}.attn.to_out.0",))),
    _rule(rf"{_LAYERS}_feed_forward_w([123])", lambda m, *_: _Parts((f"{m[1]}.{m[2]}.feed_forward.linear_{m[3]}",))),
)
_QWEN = (
    _rule(
        r"transformer_blocks_(\d+)_attn_(to_[qkv]|add_[qkv]_proj|to_add_out|to_out_0)",
        lambda m, *_: _Parts((f"transformer_blocks.{m[1]}.attn.{m[2].replace('out_0', 'out.0')}",)),
    ),
)
_WAN = (
    _rule(
        r"blocks_(\d+)_(self|cross)_attn_([qkvo])",
        lambda m, *_: _Parts(
            (f"blocks.{m[1]}.attn{1 if m[2] == 'self' else 2}." + ("to_out.0" if m[3] == "o" else f"to_{m[3]}"),)
        ),
    ),
)
_HIDREAM = (
    _rule(
        r"(double|single)_stream_blocks_(\d+)_block_attn1_(to_(?:[qkv]|out)(?:_t)?)",
        lambda m, *_: _Parts((f"{m[1]}_stream_blocks.{m[2]}.block.attn1.{m[3]}",)),
    ),
)
# ComfyUI's families (nodes/native/identity.py) by their rules.
_RULES: dict[str, tuple[_Rule, ...]] = {
    "flux": _FLUX,
    "chroma": _FLUX,
    "flux2": _FLUX2,
    "sd3": _SD3,
    "z-image": _Z_IMAGE,
    "lumina2": _LUMINA2,
    "qwen-image": _QWEN,
    "wan2.1": _WAN,
    "wan2.2": _WAN,
    "hidream": _HIDREAM,
}


def native_family(expert: Expert) -> str | None:
    """Return the family whose native names the layers have, where there are rules for it; by metadata, or by shapes."""
    native = {name: layer for name, layer in expert.layers.items() if name.startswith(f"{UNET_PREFIX}_")}
    if (named := expert.info.base_checkpoint.family) in _RULES:
        return named if any(_find(named, name, layer) for name, layer in native.items()) else None
    found = [
        family for family in _RULES if native and all(_find(family, name, layer) for name, layer in native.items())
    ]
    if {"flux", "flux2"} <= set(found) and any("_linear1" in name for name in native):
        # A single block of FLUX.2 has two thirds more MLP rows than columns, as its activation is gated.
        shapes = [layer.weight_shape for name, layer in native.items() if "_linear1" in name]
        return "flux2" if all(rows == 9 * columns for rows, columns in shapes) else "flux"
    if {"z-image", "lumina2"} <= set(found):
        shapes = [layer.weight_shape for name, layer in native.items() if name.endswith("_attention_qkv")]
        return "z-image" if all(rows == 3 * columns for rows, columns in shapes) else "lumina2"
    return found[0] if found else None


def _find(family: str, name: str, layer: LoraLayer) -> _Parts | None:
    for pattern, parts in _RULES[family]:
        if match := pattern.fullmatch(name):
            return parts(match, *layer.weight_shape[:2])
    return None


def split_layer(family: str, name: str, layer: LoraLayer) -> dict[str, LoraLayer]:
    """Return diffusers' path -> its share of a layer under ComfyUI's name.

    Raises:
        InputError: diffusers' model has no such layer, or the rows are not those of this family.
    """
    found = _find(family, name, layer)
    if found is None:
        raise InputError(f"layer {name} has no place in diffusers' model of {family}; leave it out of the file")
    if found.rows is None:
        return {found.paths[0]: layer}
    total = layer.weight_shape[0]
    if sum(found.rows) != total or min(found.rows) < 1:
        raise InputError(f"layer {name} has {total} rows, which are none of {family}; was it made for another model?")
    parts = layer.up.split(list(found.rows))
    return {
        path: LoraLayer(layer.down, part.contiguous(), layer.alpha)
        for path, part in zip(found.paths, parts, strict=True)
    }


def diffusers_layers(expert: Expert) -> dict[str, LoraLayer]:
    """Return an expert's layers by their paths in diffusers' transformer.

    Raises:
        InputError: its family is spelled the same everywhere, or not known here, or a layer has no place.
    """
    family = native_family(expert)
    if family is None:
        raise InputError(
            f"{expert.name}: nothing to split: diffusers reads these names as they are (SD1.x, SD2.x, SDXL, "
            f"lora_transformer_…), or the family is none of {', '.join(_RULES)}"
        )
    found: dict[str, LoraLayer] = {}
    for name, layer in expert.layers.items():
        found |= split_layer(family, name, layer)
    return found


def with_split_layers(expert: Expert) -> Expert:
    """Return an SD3 or FLUX.1 expert of ComfyUI's names as one trained by checkpoint is; others as they are."""
    family = native_family(expert)
    if family not in ("sd3", "flux"):
        return expert
    layers: dict[str, LoraLayer] = {}
    parts: dict[str, list[str]] = {}
    for name, layer in expert.layers.items():
        if not name.startswith(f"{UNET_PREFIX}_"):
            layers[name], parts[name] = layer, [name]
            continue
        split = {kohya_name(path, TRANSFORMER_PREFIX): part for path, part in split_layer(family, name, layer).items()}
        layers |= split
        parts[name] = list(split)
    return replace(expert, layers=layers, info=_renamed_blocks(expert.info, parts))


def _renamed_blocks(info: ExpertInfo, parts: Mapping[str, list[str]]) -> ExpertInfo:
    if info.rank_blocks is None:
        return info

    def renamed(block: RankBlockEntry) -> RankBlockEntry:
        layers = {part: rank for name, rank in block.layers.items() for part in parts[name]}
        return block.model_copy(update={"layers": layers})

    return info.model_copy(update={"rank_blocks": tuple(map(renamed, info.rank_blocks))})


def in_one_spelling(experts: Iterable[Expert]) -> list[Expert]:
    """Return experts whose layers of one weight have one name.

    Where some were trained by checkpoint (diffusers' layers) and others on ComfyUI's model (fused ones), the latter are
    split.
    """
    experts = list(experts)
    if any(name.startswith(f"{TRANSFORMER_PREFIX}_") for expert in experts for name in expert.layers):
        return [with_split_layers(expert) for expert in experts]
    return experts
