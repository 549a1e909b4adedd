"""Workflows in ComfyUI's API format: a model by stock loaders, as a user would wire it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..demo.comfyui import ComfyServer
from ..errors import InputError

Link = tuple[str, int]

# Where ComfyUI's users keep each kind of file, under models/.
_FOLDERS = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
}
_CLIP_LOADERS = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader", 4: "QuadrupleCLIPLoader"}
_WITH_TYPE = (1, 2)


class Graph(dict[str, dict[str, Any]]):
    """A workflow; `add` returns the node's id."""

    def add(self, class_type: str, **inputs: Any) -> str:
        """Add a node; `source__text=…` stands for the input `source.text`, `(id, slot)` for a link."""
        node_id = str(len(self) + 1)
        named = {name.replace("__", "."): list(v) if isinstance(v, tuple) else v for name, v in inputs.items()}
        self[node_id] = {"class_type": class_type, "inputs": named}
        return node_id


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model.

    Args:
        model: an all-in-one checkpoint, or, with `clips`, the diffusion model alone.
        clips: its text encoders, in the order of ComfyUI's loader.
        clip_type: the `type` of that loader; three and four encoders have none.
        vae: None: the checkpoint's own.
        weight_dtype: of UNETLoader, such as fp8_e4m3fn.
    """

    model: Path
    clips: tuple[Path, ...] = ()
    clip_type: str | None = None
    vae: Path | None = None
    weight_dtype: str = "default"


@dataclass(frozen=True)
class Links:
    """The outputs of a model's loaders."""

    model: Link
    clip: Link
    vae: Link


def find_model_files(
    comfyui: Path,
    model: str,
    clips: Sequence[str] = (),
    clip_type: str | None = None,
    vae: str | None = None,
    weight_dtype: str = "default",
) -> ModelFiles:
    """Return the files that a command names, by path or as they are called in ComfyUI's models folder.

    Raises:
        InputError: one is missing or of a kind that ComfyUI's own loaders do not read, or the names do not go together.
    """
    if not clips:
        if clip_type or weight_dtype != "default":
            raise InputError("--clip-type and --weight-dtype are for separate files; name the text encoder with --clip")
        own_vae = _find(comfyui, vae, "vae") if vae else None
        return ModelFiles(_find(comfyui, model, "checkpoints"), vae=own_vae)
    if len(clips) not in _CLIP_LOADERS:
        raise InputError(f"--clip is given {len(clips)} times; ComfyUI loads up to 4 text encoders together")
    if not vae:
        raise InputError("--vae is missing: a diffusion model in a file of its own needs its VAE's file too")
    if len(clips) in _WITH_TYPE and not clip_type:
        raise InputError(
            f"--clip-type is missing: the `type` of ComfyUI's {_CLIP_LOADERS[len(clips)]}, such as qwen_image, "
            "lumina2, flux or sd3"
        )
    return ModelFiles(
        _find(comfyui, model, "diffusion_models"),
        tuple(_find(comfyui, clip, "text_encoders") for clip in clips),
        clip_type if len(clips) in _WITH_TYPE else None,
        _find(comfyui, vae, "vae"),
        weight_dtype,
    )


def _find(comfyui: Path, name: str, kind: str) -> Path:
    places = [Path(name), *(comfyui / "models" / folder / name for folder in _FOLDERS[kind])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(f"no such file: {name}; give a path, or a name in {places[1].parent}")
    if found.suffix == ".gguf":
        raise InputError(
            f"{name} is a GGUF file, which ComfyUI itself does not load: use the bf16, fp16 or fp8 file, or "
            "train in ComfyUI, with ComfyUI-GGUF's loader"
        )
    if found.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{name} is no safetensors file; save it as one in ComfyUI, and name that")
    return found


def add_loaders(graph: Graph, server: ComfyServer, files: ModelFiles) -> Links:
    """Make the files known to the server and add the stock loaders."""
    vae = None
    if files.vae:
        vae = (graph.add("VAELoader", vae_name=server.add_model(files.vae, "vae")), 0)
    if not files.clips:
        loader = graph.add("CheckpointLoaderSimple", ckpt_name=server.add_model(files.model))
        return Links((loader, 0), (loader, 1), vae or (loader, 2))
    assert vae
    name = server.add_model(files.model, "diffusion_models")
    model = graph.add("UNETLoader", unet_name=name, weight_dtype=files.weight_dtype)
    names = [server.add_model(path, "text_encoders") for path in files.clips]
    inputs = {"clip_name": names[0]} if len(names) == 1 else {f"clip_name{i}": n for i, n in enumerate(names, start=1)}
    if files.clip_type:
        inputs["type"] = files.clip_type
    clip = graph.add(_CLIP_LOADERS[len(names)], **inputs)
    return Links((model, 0), (clip, 0), vae)


def add_experts(graph: Graph, server: ComfyServer, model: Link, experts: Sequence[tuple[Path, float]]) -> Link:
    """Put LoRA files onto a MODEL with the stock loader; return the link to what comes out."""
    for number, (path, strength) in enumerate(experts):
        folder = str(number)  # two files of one name are two files
        name = f"{folder}/{server.add_model(path, f'loras/{folder}')}"
        model = (graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength), 0)
    return model
