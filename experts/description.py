"""What a file contains, in plain values: for `inspect`, for the nodes and for people."""

import os
from pathlib import Path

from ..tensor_file import read_tensors
from .blocks import rank_blocks
from .expert import Expert
from .keys import comfyui_matches


def describe_file(path: str | os.PathLike) -> dict:
    """Return what an expert file or any LoRA contains and which of its keys stock ComfyUI's loader knows.

    Raises:
        InputError: the file cannot be read as a LoRA.
    """
    tensors, metadata = read_tensors(path)
    expert = Expert.from_state_dict(tensors, metadata, str(path))
    expert.name = Path(path).stem
    ignored = [key for key in tensors if not comfyui_matches(key)]
    return {
        **describe_expert(expert),
        "comfyui": {
            "matched_keys": len(tensors) - len(ignored),
            "ignored_keys": len(ignored),
            "first_ignored": ignored[:3],
        },
    }


def describe_expert(expert: Expert) -> dict:
    """Return categories, ranks, blocks and origin of an expert."""
    ranks = sorted({layer.rank for layer in expert.layers.values()})
    alphas = sorted({layer.alpha for layer in expert.layers.values()})
    blocks = rank_blocks(expert) if "rank_blocks" in expert.info else []
    kept = ("base_checkpoint", "objective", "dataset_fingerprint", "step", "seed", "recipe", "metrics", "trained_with")
    merge = ("method", "parameters", "parents", "statistics_sha256", "category_strengths", "extracted", "converted")
    return {
        "name": expert.name,
        "categories": expert.categories,
        "num_layers": len(expert.layers),
        "ranks": ranks,
        "alphas": alphas,
        "num_values": sum(layer.down.numel() + layer.up.numel() for layer in expert.layers.values()),
        **_retained(expert),
        **{key: expert.info[key] for key in (*kept, *merge) if key in expert.info},
        "rank_blocks": [
            {"name": block.name, "categories": list(block.categories), "num_layers": len(block.ranks)}
            for block in blocks
        ],
    }


def _retained(expert: Expert) -> dict:
    layers = expert.info.get("retained_energy")
    if not layers:
        return {}
    return {"retained_energy": {"mean": sum(layers.values()) / len(layers), "least": min(layers.values())}}
