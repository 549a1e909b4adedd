"""Finding CLIP's and T5's tokenizers on this machine. All families share their vocabularies."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

HUB_NAME = "openai/clip-vit-large-patch14"
START_TOKEN, END_TOKEN = 49406, 49407
T5_END = 1
_CLIP_IN_COMFYUI, _T5_IN_COMFYUI = Path("sd1_tokenizer"), Path("text_encoders", "t5_tokenizer")


def load_tokenizer(folder: str | os.PathLike | None = None) -> Any:
    """Return CLIP's tokenizer from `folder`, else from ComfyUI, else from the local Hugging Face cache. No network.

    ComfyUI is looked for in the environment variable COMFYUI_PATH, then where its custom_nodes hold this pack.

    Raises:
        InputError: `folder` holds no CLIP tokenizer, or none is found anywhere.
    """
    from transformers import CLIPTokenizer  # imported where needed: it takes seconds

    candidates = [Path(folder)] if folder is not None else _clip_folders()
    found = next(filter(_is_tokenizer, candidates), None)
    if found is None:
        where = f"in {folder}" if folder is not None else "in COMFYUI_PATH, around this pack or in the cache"
        raise InputError(
            f"no CLIP tokenizer {where}: set COMFYUI_PATH to a ComfyUI folder, or name a folder with vocab.json and "
            f"merges.txt (ComfyUI's comfy/sd1_tokenizer, or a download of {HUB_NAME})"
        )
    tokenizer = CLIPTokenizer.from_pretrained(str(found), local_files_only=True)
    if tokenizer("")["input_ids"] != [START_TOKEN, END_TOKEN]:
        raise InputError(f"{found} is not the tokenizer of CLIP; name ComfyUI's comfy/sd1_tokenizer")
    return tokenizer


def load_t5_tokenizer(bundled: Path | None = None, clip_folder: str | os.PathLike | None = None) -> Any:
    """Return T5's tokenizer from `bundled`, else from a ComfyUI whose CLIP tokenizer is `clip_folder`, else as above.

    Raises:
        InputError: none is found anywhere.
    """
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]  # transformers 5 makes it at run time

    candidates = [bundled] if bundled is not None else []
    if clip_folder is not None:
        candidates.append(Path(clip_folder).parent / _T5_IN_COMFYUI)
    candidates += [folder / _T5_IN_COMFYUI for folder in _comfy_folders()]
    found = next((folder for folder in candidates if (folder / "tokenizer.json").is_file()), None)
    if found is None:
        raise InputError(
            "no T5 tokenizer: set COMFYUI_PATH to a ComfyUI folder (it has comfy/text_encoders/t5_tokenizer), or use "
            "a diffusers folder with its tokenizers"
        )
    tokenizer = T5TokenizerFast.from_pretrained(str(found), local_files_only=True)
    if tokenizer("")["input_ids"] != [T5_END]:
        raise InputError(f"{found} is not the tokenizer of T5; name ComfyUI's comfy/text_encoders/t5_tokenizer")
    return tokenizer


def _is_tokenizer(folder: Path) -> bool:
    has_parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return has_parts or (folder / "tokenizer.json").is_file()


def _comfy_folders() -> Iterator[Path]:
    if root := os.environ.get("COMFYUI_PATH"):
        yield Path(root).expanduser() / "comfy"
    # The pack may be linked into custom_nodes, or the link may be what was installed.
    for pack in (Path(__file__).absolute().parents[1], Path(__file__).resolve().parents[1]):
        if pack.parent.name == "custom_nodes":
            yield pack.parents[1] / "comfy"


def _clip_folders() -> Iterator[Path]:
    for folder in _comfy_folders():
        yield folder / _CLIP_IN_COMFYUI
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(HUB_NAME, "vocab.json")
    if isinstance(cached, str):
        yield Path(cached).parent
