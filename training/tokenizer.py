"""Finding CLIP's tokenizer on this machine. All Stable Diffusion families share its vocabulary."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

HUB_NAME = "openai/clip-vit-large-patch14"


def load_tokenizer(folder: str | os.PathLike | None = None) -> Any:
    """Return CLIP's tokenizer from `folder`, else from ComfyUI, else from the local Hugging Face cache. No network.

    ComfyUI is looked for in the environment variable COMFYUI_PATH, then where its custom_nodes hold this pack.

    Raises:
        InputError: `folder` holds no tokenizer, or none is found anywhere.
    """
    from transformers import CLIPTokenizer  # imported where needed: it takes seconds

    if folder is not None and not _is_tokenizer(Path(folder)):
        raise InputError(
            f"no CLIP tokenizer in {folder}: name a folder with vocab.json and merges.txt, such as ComfyUI's "
            "comfy/sd1_tokenizer"
        )
    candidates = [Path(folder)] if folder is not None else filter(_is_tokenizer, _comfyui_folders())
    for candidate in candidates:
        return CLIPTokenizer.from_pretrained(str(candidate), local_files_only=True)
    try:
        return CLIPTokenizer.from_pretrained(HUB_NAME, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            "no CLIP tokenizer found: set COMFYUI_PATH to a ComfyUI folder, or name a folder with its vocab.json and "
            f"merges.txt (ComfyUI's comfy/sd1_tokenizer, or a download of {HUB_NAME})"
        ) from error


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _comfyui_folders() -> Iterator[Path]:
    if root := os.environ.get("COMFYUI_PATH"):
        yield Path(root) / "comfy" / "sd1_tokenizer"
    pack = Path(__file__).absolute().parents[1]  # not resolved: the pack may be linked into custom_nodes
    if pack.parent.name == "custom_nodes":
        yield pack.parents[1] / "comfy" / "sd1_tokenizer"
