"""What a MODEL, CLIP or VAE is: its loader's file and what was added to its weights, read from the object itself."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import comfy.supported_models
import folder_paths
from torch import Tensor

from ...checkpoint_id import CheckpointId
from ...models.weights_file import cached_sha256
from ...tensor_file import tensor_bytes
from . import packed

_NAMES = {
    "SDXLRefiner": "sdxl-refiner",
    "SSD1B": "sdxl",
    "FluxSchnell": "flux",
    "ZImage": "z-image",
    "QwenImage": "qwen-image",
    "CosmosT2IPredict2": "cosmos-predict2",
    "WAN21_T2V": "wan2.1",
    "WAN22_T2V": "wan2.2",
    "ErnieImage": "ernie-image",
    "MageFlow": "mage-flow",
}


def identify(patcher) -> CheckpointId:
    """Return what drew: the loader's file and its hash, the family, and hashes of the patches on the weights."""
    path = _loader_file(patcher)
    family = family_name(type(patcher.model.model_config))
    patches = tuple(_patch_hashes(patcher))
    if path is None:  # a loader that names no file, such as GGUF's
        weights = {"weights": weights_sha256(patcher)}
        kind = "GGUF" if packed.is_gguf(patcher) else "its loader names no file"
        return CheckpointId(name=f"a {family} model ({kind})", family=family, files=weights, patches=patches)
    return CheckpointId(name=_entry_name(path), sha256=cached_sha256(path), family=family, patches=patches)


def part_id(patcher) -> str:
    """Return a hash of a VAE's or CLIP's files, or of its weights, and its patches."""
    paths = _loader_files(patcher)
    parts = [cached_sha256(path) for path in paths] or [weights_sha256(patcher)]
    return hashlib.sha256(repr((parts, list(_patch_hashes(patcher)))).encode()).hexdigest()


def family_name(config: type) -> str:
    """Return a family's name as files spell it, of a class of comfy.supported_models."""
    return _NAMES.get(config.__name__) or re.sub(r"[^a-z0-9]+", "-", config.__name__.lower())


def latent_formats(family: str) -> set[str]:
    """Return the latent formats of the models that ComfyUI knows under a family's name; empty if it knows none."""
    configs = comfy.supported_models.models
    return {config.latent_format.__name__ for config in configs if family_name(config) == family}


def weights_sha256(patcher) -> str:
    """Return a hash of all weights, kept on the model once it is known."""
    model = patcher.model
    if not hasattr(model, "safety_experts_sha256"):
        digest = hashlib.sha256()
        parameters = dict(model.named_parameters())
        for name, value in sorted(model.state_dict().items()):
            # A GGUF layer's state dict is an outline on the meta device; its packed bytes are the parameter's.
            value = parameters.get(name, value).as_subclass(Tensor)
            digest.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            digest.update(b"" if value.is_meta else tensor_bytes(value))
        model.safety_experts_sha256 = digest.hexdigest()
    return model.safety_experts_sha256


def _loader_files(patcher) -> list[Path]:
    given = (getattr(patcher, "cached_patcher_init", None) or (None, ()))[1]
    first = given[0] if given else None
    found = first if isinstance(first, list | tuple) else [first]
    return [Path(path) for path in found if isinstance(path, str | Path) and Path(path).is_file()]


def _loader_file(patcher) -> Path | None:
    paths = _loader_files(patcher)
    return paths[0] if len(paths) == 1 else None


def _entry_name(path: Path) -> str:
    """Return how a file is called in ComfyUI's lists."""
    for kind in ("checkpoints", "diffusion_models"):
        for root in folder_paths.get_folder_paths(kind):
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
    return path.name


def _patch_hashes(patcher) -> Iterator[str]:
    """Yield one hash for all that was added to the weights, or nothing."""
    if not patcher.patches:
        return
    digest = hashlib.sha256()
    for key, patches in sorted(patcher.patches.items()):
        for strength, patch, strength_model, *_ in patches:
            digest.update(f"{key} {strength} {strength_model} {type(patch).__name__}\n".encode())
            for value in _tensors(patch):
                digest.update(tensor_bytes(value))
    yield digest.hexdigest()


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
