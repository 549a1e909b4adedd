"""The one place that knows how LoRA files spell their keys: kohya is written, every common spelling is read.

kohya            lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight / .lora_up.weight / .alpha
diffusers PEFT   unet.down_blocks.0.….attn1.to_q.lora_A.weight / .lora_B.weight
diffusers        unet.….attn1.to_q.lora.down.weight, unet.….attn1.processor.to_q_lora.down.weight
peft             base_model.model.down_blocks.0.….lora_A.weight (also with an adapter name before .weight)
native           diffusion_model.input_blocks.1.1.….lora_down.weight (also under lora_unet_)

SD3 and FLUX have a transformer: lora_transformer_transformer_blocks_0_attn_to_q (OneTrainer's spelling) is written, as
stock ComfyUI ignores lora_unet_ before diffusers names of these, and transformer.transformer_blocks.0.… is read too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..typed import parse_json, printable

UNET_PREFIX, TRANSFORMER_PREFIX = "lora_unet", "lora_transformer"
_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    r"\.lora_(?P<letter>[AB])(?:\.[^.]+)?\.weight|"  # peft, with or without an adapter name
    r"\.lora_(?P<kohya>down|up|mid)\.weight|"
    r"[._]lora\.(?P<diffusers>down|up)\.weight|"
    r"\.lora_linear_layer\.(?P<old>down|up)\.weight|"
    r"(?P<alpha>\.alpha))"
)
_MODULE_NAME = re.compile(r"[\w.-]{1,500}")
MAX_KEY = 1000  # letters; the regular expressions here take their square
# A path's beginning tells which model it belongs to; the longest match is first.
_COMPONENTS = {
    "unet.": "unet",
    "transformer.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "diffusion_model.": "native",
    "model.diffusion_model.": "native",
}
_BARE_UNET = re.compile(
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding|"
    r"input_blocks|middle_block|output_blocks)(\.|$)"
)
_TRANSFORMER = re.compile(
    r"((single_)?transformer_blocks|time_text_embed|context_embedder|x_embedder|pos_embed|norm_out|proj_out)([._]|$)"
)
# Native names of Qwen-Image and Mage-Flow, as musubi-tuner and native training write them.
_QWEN_BLOCK = re.compile(r"lora_unet_transformer_blocks_\d+_")
_NATIVE_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_NATIVE_OTHER = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


@dataclass(frozen=True)
class LoraTensors:
    """The tensors of one layer: down [r, in, …], up [out, r, …], and alpha as kohya counts it (scale alpha / r)."""

    down: Tensor
    up: Tensor
    alpha: float


def kohya_name(module_path: str, prefix: str | None = None) -> str:
    """Return the kohya name of a diffusers module, `down_blocks.0.….to_q` -> `lora_unet_down_blocks_0_…_to_q`.

    Args:
        prefix: None tells by the path whether it lies in a UNet or in the transformer of SD3 or FLUX.
    """
    if prefix is None:
        prefix = TRANSFORMER_PREFIX if _TRANSFORMER.match(module_path) else UNET_PREFIX
    return f"{prefix}_{module_path.replace('.', '_')}"


def spell_for_loaders(key: str) -> str:
    """Return a kohya key as it is written: SDXL's vector embedding under its native name, as kohya does.

    Diffusers' converter cuts the number off `add_embedding_linear_1` and then ignores the layer.
    """
    for native, diffusers in _NATIVE_OTHER.items():
        if native.startswith("label_emb"):
            key = key.replace(f"{UNET_PREFIX}_{diffusers}.", f"{UNET_PREFIX}_{native}.")
    return key


def layer_name(path: str, two_encoders: bool = False) -> str | None:
    """Return the kohya name of a layer under any known spelling of its path (a key without its last part).

    Args:
        two_encoders: "text_encoder." is the first of two (SDXL).
    """
    place = _locate(path)
    return place and _module_name(*place, two_encoders)


def keys_by_layer(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return kohya layer name -> its keys, of keys that `read_lora_keys` can read."""
    keys = list(keys)
    two_encoders = has_second_encoder(keys)
    groups: dict[str, list[str]] = {}
    for key in keys:
        if len(key) <= MAX_KEY and (match := _KEY.fullmatch(key)) and (name := layer_name(match["path"], two_encoders)):
            groups.setdefault(name, []).append(key)
    return groups


def has_second_encoder(keys: Iterable[str]) -> bool:
    """Say whether a file's diffusers keys tell two text encoders apart."""
    return any(key.startswith("text_encoder_2.") for key in keys)


def read_lora_keys(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> dict[str, LoraTensors]:
    """Sort LoRA tensors into layers by kohya module name.

    Args:
        tensors: down, up and alpha tensors under any known spelling.
        metadata: string metadata of the file; diffusers ≥ 0.35 keeps rank and alpha there.
        source: named in errors.

    Raises:
        InputError: a key matches nothing known, occurs twice, or a layer lacks one of its parts.
    """
    two_encoders = has_second_encoder(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    origin: dict[str, tuple[str, str]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key) if len(key) <= MAX_KEY and key.isprintable() else None
        place = match and _locate(match["path"])
        if not match or not place:
            unknown.append(key)
            continue
        component, path = place
        module = _module_name(component, path, two_encoders)
        part = _part(match)
        if part in found.setdefault(module, {}):
            raise InputError(f"{source}: layer {module} occurs twice, again as {key!r}; remove one spelling")
        found[module][part] = tensor
        origin[module] = place
    if unknown or not found:
        raise InputError(_unknown_keys_message(unknown, len(tensors), source))
    adapter = _AdapterMetadata(metadata, source)
    layers = {}
    for module, parts in found.items():
        if missing := [part for part in ("down", "up") if part not in parts]:
            raise InputError(f"{source}: layer {module} has no {missing[0]} part; the file is incomplete")
        down = parts["down"]
        if down.ndim < 2 or parts["up"].ndim < 2:
            raise InputError(f"{source}: layer {module} holds no matrices; the file is damaged, use another copy")
        if "mid" in parts:
            down = _tucker_down(parts["mid"], down, f"{source}: layer {module}")
        if "alpha" in parts:
            alpha = read_alpha(parts["alpha"], f"{source}: layer {module}")
        else:
            alpha = adapter.alpha(*origin[module], parts["down"].shape[0])
        layers[module] = LoraTensors(down, parts["up"], alpha)
    return layers


def read_alpha(tensor: Tensor, where: str) -> float:
    """Return the one number that an alpha tensor holds.

    Raises:
        InputError: it holds none, or several.
    """
    if tensor.numel() != 1 or tensor.is_complex():
        raise InputError(f"{where} has an alpha of the shape {list(tensor.shape)}, not one number; use another copy")
    return float(tensor)


def _tucker_down(core: Tensor, down: Tensor, where: str) -> Tensor:
    """Return a Tucker convolution's 1x1 down [s, i] and kernel [r, s, k, l] together: one k x k down [r, i, k, l]."""
    if core.ndim != 4 or core.shape[1] != down.shape[0]:
        raise InputError(
            f"{where} has a mid part of the shape {list(core.shape)} for a down part of {list(down.shape)}; "
            "the file is damaged, use another copy"
        )
    return torch.einsum("rskl,si->rikl", core.float(), down.float().flatten(1))


def comfyui_matches(key: str) -> bool:
    """Say whether stock ComfyUI's loader knows this spelling for a model of ours (v0.30.0).

    A name without prefix is known for FLUX only, and `base_model.model.` for SD3 only: neither counts.
    """
    match = _KEY.fullmatch(key) if len(key) <= MAX_KEY else None
    if not match:
        return False
    path = match["path"]
    if path.startswith(("transformer.", f"{TRANSFORMER_PREFIX}_")):
        return _TRANSFORMER.match(re.sub(r"^(lora_)?transformer[._]", "", path)) is not None
    if _TRANSFORMER.match(path.removeprefix(f"{UNET_PREFIX}_")):
        return _QWEN_BLOCK.match(path) is not None
    if path.startswith((f"{UNET_PREFIX}_", "lycoris_", "lora_te_", "lora_te1_", "lora_te2_", "diffusion_model.")):
        return "." not in path or path.startswith("diffusion_model.")
    if path.startswith("unet.") and not path.startswith("unet.base_model."):
        # Its table spells attention layers `….processor.to_q`, so plain `….attn1.to_q` is ignored.
        return ".to_" not in path or ".processor.to_" in path
    return path.startswith(("text_encoder.text_model.", "text_encoder_2.text_model."))


def _part(match: re.Match) -> str:
    if match["letter"]:
        return "down" if match["letter"] == "A" else "up"
    return match["kohya"] or match["diffusers"] or match["old"] or "alpha"


def _locate(path: str) -> tuple[str, str] | None:
    """Split a key's path into its model ("unet", "text_encoder", …, or "" for kohya names) and the module path."""
    if "." not in path and path.startswith("lycoris_"):
        return "unet", path.removeprefix("lycoris_")
    if "." not in path and path.startswith("lora_"):
        return "", path
    for prefix, component in _COMPONENTS.items():
        if path.startswith(prefix):
            return component, path.removeprefix(prefix).removeprefix("base_model.model.")
    bare = path.removeprefix("base_model.model.")
    if _BARE_UNET.match(bare) or _TRANSFORMER.match(bare):
        return "unet", bare
    return ("text_encoder", bare) if bare.startswith("text_model.") else None


def _module_name(component: str, path: str, two_encoders: bool) -> str:
    if component.startswith("text_encoder"):
        prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        return kohya_name(path, prefix if two_encoders else "lora_te")
    if component == "unet":
        path = re.sub(r"\.processor\.to_out$", ".to_out.0", path).replace(".processor.", ".")
        name = path.replace(".", "_")
    elif component == "native" or path.startswith(f"{UNET_PREFIX}_"):
        # ComfyUI's own names: Qwen-Image's `transformer_blocks` are not those of SD3 and FLUX in diffusers.
        return kohya_name(_diffusers_from_native(path.removeprefix(f"{UNET_PREFIX}_").replace(".", "_")), UNET_PREFIX)
    else:
        return path
    return kohya_name(_diffusers_from_native(name))


def _diffusers_from_native(name: str) -> str:
    """Translate `input_blocks_4_1_…` to `down_blocks_1_attentions_0_…`.

    Counts two residual blocks a level, as SD1, SD2 and SDXL have.
    """
    if name in _NATIVE_OTHER:
        return _NATIVE_OTHER[name]
    match = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(.+)", name)
    if not match:
        return name
    side, first, rest = match[1], int(match[2]), match[3]
    if side == "middle":
        block = "mid_block"
        kind, index = ("attentions", 0) if first == 1 else ("resnets", first // 2)
        inner = rest
    else:
        position, inner = rest.split("_", 1)
        level, index = divmod(first - 1 if side == "input" else first, 3)
        block = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
        if inner in ("op", "conv"):
            return f"{block}_{'downsamplers' if side == 'input' else 'upsamplers'}_0_conv"
        kind = "resnets" if position == "0" else "attentions"
    if kind == "resnets":
        inner = _NATIVE_RESNET.get(inner, inner)
    return f"{block}_{kind}_{index}_{inner}"


class _AdapterMetadata:
    """Rank and alpha as peft keeps them, in the `lora_adapter_metadata` that diffusers ≥ 0.35 writes."""

    def __init__(self, metadata: Mapping[str, str], source: str):
        self._where = f"{source}: metadata 'lora_adapter_metadata'"
        text = metadata.get("lora_adapter_metadata")
        values = parse_json(text, self._where) if text is not None else {}
        if not isinstance(values, dict):
            raise InputError(f"{self._where} is damaged (no JSON object); use another copy")
        self._values = values
        self._own_alphas: dict[str, dict[str, tuple[int, float]]] = {}

    def alpha(self, component: str, path: str, rank: int) -> float:
        """Return kohya's alpha of a layer without an alpha tensor; the rank where the metadata says nothing."""
        alpha = self._own_alpha(component, path)
        if alpha is None:
            alpha = self._number(self._value(component, "lora_alpha", rank), "lora_alpha")
        # rsLoRA scales by alpha / sqrt(rank) where kohya scales by alpha / rank.
        return alpha * (math.sqrt(rank) if self._value(component, "use_rslora", False) is True else 1.0)

    def _value(self, component: str, name: str, default: Any) -> Any:
        return self._values.get(f"{component}.{name}", self._values.get(name, default))

    def _number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise InputError(f"{self._where} is damaged ({name} is no finite number); use another copy")
        return float(value)

    def _own_alpha(self, component: str, path: str) -> float | None:
        """Return the alpha of the first pattern that is the end of a path, as peft takes it.

        peft lets a pattern be a regular expression. A file's can be made to run for ever, so only names are read.
        """
        if component not in self._own_alphas:
            patterns = self._value(component, "alpha_pattern", None) or {}
            if not isinstance(patterns, dict):
                raise InputError(f"{self._where} is damaged (alpha_pattern is no object); use another copy")
            if any(not _MODULE_NAME.fullmatch(pattern) for pattern in patterns):
                raise InputError(
                    f"{self._where}: alpha_pattern holds a regular expression; only names of modules are read, "
                    "write the alphas into the file as tensors"
                )
            self._own_alphas[component] = {
                pattern: (place, self._number(value, "alpha_pattern"))
                for place, (pattern, value) in enumerate(patterns.items())
            }
        own, parts = self._own_alphas[component], path.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts))] if own else []
        found = [own[suffix] for suffix in suffixes if suffix in own]
        return min(found)[1] if found else None


def _unknown_keys_message(unknown: Iterable[str], num_keys: int, source: str) -> str:
    keys = list(unknown)
    if not keys:
        return f"{source} holds no tensors; give a LoRA file"
    first = ", ".join(repr(printable(key, 100)) for key in keys[:3])
    text = " ".join(keys)
    if "dora_scale" in text or "lora_magnitude_vector" in text:
        hint = "DoRA is not a low-rank change and cannot be merged"
    elif "hada_" in text or "lokr_" in text:
        hint = "turn LoHa and LoKr into a LoRA with `safety-experts convert`"
    elif any(key.startswith(("model.diffusion_model.", "conv_in.", "first_stage_model.")) for key in keys):
        hint = "this looks like a whole model; give a LoRA file"
    else:
        hint = "LoRA keys spelled the kohya, diffusers or peft way are read"
    return f"{source}: {len(keys)} of {num_keys} keys are no LoRA keys, first {first}; {hint}"
