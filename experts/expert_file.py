"""Expert files: kohya LoRAs that stock loaders read, with the expert's facts in the metadata (design §4)."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..errors import SafetyExpertsError
from ..files import remove_leftovers, sha256_of_file
from ..tensor_file import TensorFile, read_tensors, write_tensors
from .expert import Expert, LoraLayer, checked_layer, layer_problem, layer_tensors
from .fused import diffusers_layers
from .info import METADATA_KEY
from .keys import keys_by_layer, read_lora_keys, spell_for_loaders

# Model family -> kohya's base model version and modelspec's architecture.
_FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd20": ("sd_v2", None),  # modelspec tells 512 from 768 pixels, we do not
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "sd3": ("sd3", "stable-diffusion-3/lora"),
    "flux": ("flux1", "flux-1/lora"),  # dev and schnell have one shape
}


def save_expert(expert: Expert, path: str | os.PathLike) -> None:
    """Write an expert; the same expert gives the same bytes, and success means it was read back and compared.

    Raises:
        SafetyExpertsError: a layer is no usable low-rank change or there is none, or the file could not be written; no
            file is left behind.
    """
    if not expert.layers:
        raise SafetyExpertsError(f"{path} was not written: the expert has no layers, so it would change nothing")
    tensors: dict[str, Tensor] = {}
    for name, layer in expert.layers.items():
        if problem := layer_problem(layer):
            raise SafetyExpertsError(f"{path} was not written: layer {name} {problem}")
        tensors |= {spell_for_loaders(key): tensor for key, tensor in layer_tensors(name, layer)}
    metadata = expert_metadata(expert)
    remove_leftovers(path)
    write_tensors(path, tensors, metadata)


def save_diffusers(expert: Expert, path: str | os.PathLike) -> None:
    """Write a transformer's expert under diffusers' names, `transformer.….lora_A.weight`, fused layers split.

    Alpha is multiplied into B (float32): diffusers reads no alpha of these. It is exact where alpha is the rank.

    Raises:
        InputError: the family is not one of diffusers' transformers that are known here, or a layer has no place.
        SafetyExpertsError: the file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in diffusers_layers(expert).items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down.float().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = (layer.up.float() * layer.scale).contiguous()
    remove_leftovers(path)
    metadata = expert_metadata(replace(expert, info=expert.info.model_copy(update={"rank_blocks": None})))
    write_tensors(path, tensors, {**metadata, "format": "pt"})


def load_expert(path: str | os.PathLike) -> Expert:
    """Read an expert, or any LoRA in a known spelling (then with no categories).

    Raises:
        InputError: no such file, not safetensors, or keys that match nothing known; the message names the file.
    """
    tensors, metadata = read_tensors(path)
    expert = Expert.from_state_dict(tensors, metadata, str(path))
    return replace(expert, name=Path(path).stem, file_sha256=sha256_of_file(path))


class StreamedLayers(Mapping[str, LoraLayer]):
    """The layers of a LoRA file, each read anew when it is asked for.

    Raises:
        InputError: as `load_expert` does.
    """

    def __init__(self, file: TensorFile, source: str):
        self._file, self._source = file, source
        self._keys = keys_by_layer(file)

    def __getitem__(self, name: str) -> LoraLayer:
        tensors = {key: self._file[key] for key in self._keys[name]}
        (parts,) = read_lora_keys(tensors, self._file.metadata, self._source).values()
        return checked_layer(parts, name, self._source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_expert(path: str | os.PathLike) -> Expert:
    """Do as `load_expert`, but keep no layer in memory: each is read when it is asked for.

    Raises:
        InputError: as `load_expert` does; the numbers of a layer are checked when it is read.
    """
    file = TensorFile(path)
    outline = {key: file[key] if key.endswith(".alpha") else file.outline(key, "meta") for key in file}
    expert = Expert.from_state_dict(outline, file.metadata, str(path))
    return Expert(StreamedLayers(file, str(path)), expert.info, Path(path).stem, sha256_of_file(path))


def expert_metadata(expert: Expert) -> dict[str, str]:
    """Return the string metadata of an expert's file: `safety_experts`, kohya's `ss_*` and `modelspec.*`.

    There is no time stamp in it: the same expert must give the same file.
    """
    base, trained = expert.info.base_checkpoint, expert.info.trained
    version, architecture = _FAMILIES.get(base.family, (None, None))
    ranks = {layer.rank for layer in expert.layers.values()}
    alphas = {layer.alpha for layer in expert.layers.values()}
    optional = {
        "ss_base_model_version": version,
        "ss_sd_model_name": base.name or None,
        "ss_new_sd_model_hash": base.sha256 or None,
        "modelspec.architecture": architecture,
    }
    if expert.info.categories:
        what = ", ".join(expert.info.categories)
        optional["modelspec.description"] = f"Safety expert: turns a model away from {what}"
        optional["modelspec.tags"] = f"safety, {what}"
        optional["modelspec.usage_hint"] = "LoRA at strength 1"
    if expert.info.parents:
        optional["modelspec.merged_from"] = ", ".join(parent.name for parent in expert.info.parents)
    if trained:
        optional |= {"ss_seed": trained.seed, "ss_steps": trained.step}
        optional |= {"ss_learning_rate": trained.recipe.get("learning_rate")}
    return {
        METADATA_KEY: expert.info.to_json(),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_output_name": expert.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": expert.name,
        **{key: str(value) for key, value in optional.items() if value is not None},
    }
