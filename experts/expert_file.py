"""Expert files: kohya LoRAs that stock loaders read, with the expert's facts in the metadata (design §4)."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..errors import SafetyExpertsError
from ..files import sha256_of_file
from ..tensor_file import TensorFile, read_tensors, write_tensors
from .expert import FORMAT_VERSION, METADATA_KEY, Expert, LoraLayer
from .keys import keys_by_layer, read_lora_keys, spell_for_loaders

logger = logging.getLogger(__name__)

# Model family -> kohya's base model version and modelspec's architecture.
_FAMILIES: dict[str, tuple[str | None, str | None]] = {
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd20": ("sd_v2", None),  # modelspec tells 512 from 768 pixels, we do not
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}


def save_expert(expert: Expert, path: str | os.PathLike) -> None:
    """Write an expert; the same expert gives the same bytes, and success means it was read back and compared.

    Raises:
        SafetyExpertsError: a number is not finite, or the file could not be written; no file is left behind.
    """
    for name, layer in expert.layers.items():
        if not (torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()):
            raise SafetyExpertsError(
                f"{path} was not written: layer {name} holds NaN or infinite numbers; "
                "train again with a lower learning rate or in fp32"
            )
    tensors = {spell_for_loaders(key): tensor for key, tensor in expert.state_dict().items()}
    write_tensors(path, tensors, expert_metadata(expert))


def load_expert(path: str | os.PathLike) -> Expert:
    """Read an expert, or any LoRA in a known spelling (then with no categories).

    Raises:
        InputError: no such file, not safetensors, or keys that match nothing known; the message names the file.
    """
    tensors, metadata = read_tensors(path)
    expert = Expert.from_state_dict(tensors, metadata, str(path))
    expert.name = Path(path).stem
    expert.file_sha256 = sha256_of_file(path)
    return expert


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
        return LoraLayer(parts.down, parts.up, parts.alpha)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def open_expert(path: str | os.PathLike) -> Expert:
    """Do as `load_expert`, but keep no layer in memory: each is read when it is asked for.

    Raises:
        InputError: as `load_expert` does; layers are checked by their names and shapes.
    """
    file = TensorFile(path)
    outline = {key: file[key] if key.endswith(".alpha") else file.outline(key, "meta") for key in file}
    expert = Expert.from_state_dict(outline, file.metadata, str(path))
    return Expert(StreamedLayers(file, str(path)), expert.info, Path(path).stem, sha256_of_file(path))


def expert_metadata(expert: Expert) -> dict[str, str]:
    """Return the string metadata of an expert's file: `safety_experts`, kohya's `ss_*` and `modelspec.*`.

    There is no time stamp in it: the same expert must give the same file.
    """
    info = {**expert.info, "format_version": FORMAT_VERSION}
    base = info.get("base_checkpoint") or {}
    recipe = info.get("recipe") or {}
    version, architecture = _FAMILIES.get(str(base.get("family")), (None, None))
    ranks = {layer.rank for layer in expert.layers.values()}
    alphas = {layer.alpha for layer in expert.layers.values()}
    optional = {
        "ss_base_model_version": version,
        "ss_sd_model_name": base.get("name"),
        "ss_new_sd_model_hash": base.get("sha256"),
        "ss_seed": info.get("seed"),
        "ss_steps": info.get("step"),
        "ss_learning_rate": recipe.get("learning_rate"),
        "modelspec.architecture": architecture,
    }
    return {
        METADATA_KEY: json.dumps(info, ensure_ascii=False, sort_keys=True, separators=(",", ":")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_output_name": expert.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": expert.name,
        **{key: str(value) for key, value in optional.items() if value is not None},
    }
