"""Opening a transformers folder: local files only, safetensors only, nothing missing."""

import hashlib
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import sha256_of_file


def config_of(folder: Path) -> Any:
    """Return a folder's configuration.

    Raises:
        InputError: there is no such folder, or no configuration in it that transformers knows.
    """
    from transformers import AutoConfig

    if not folder.is_dir():
        raise InputError(f"no model folder {folder}; check the name")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; give the folder of a transformers model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises its own, ValueError, KeyError, OSError
        raise InputError(f"{folder / 'config.json'}: {_one_line(error)}") from error


def check_loaded(kind: Any, folder: Path) -> Any:
    """Return `kind.from_pretrained(folder)` in float32 and evaluation mode.

    Raises:
        InputError: there are no safetensors weights, they do not fit, or some are missing: transformers would draw
            those at random, and a judge of random weights looks like one that works.
    """
    files(folder)
    try:
        model, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise InputError(f"{folder}: {_one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}; give the whole model")
    return model.float().eval()


def files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted.

    Raises:
        InputError: there are none; pickles (.bin, .pt) are not opened.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise InputError(f"{folder}: no .safetensors file; pickles are not opened, convert the weights first")
    return found


def weights_sha256(folder: Path) -> str:
    """Return one hex sha256 of all weights and the configuration."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files(folder)]:
        digest.update(sha256_of_file(path).encode())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
