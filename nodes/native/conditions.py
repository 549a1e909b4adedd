"""Prompts to what any ComfyUI model is conditioned on: one row of named tensors a prompt, of any length, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...errors import InputError
from ...models.denoiser import Conditions

CROSS = "cross_attn"
Row = Mapping[str, Tensor]  # name -> [...], without the batch axis


def encode_rows(clip, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return what CLIP's scheduled encode gives for each prompt: `cross_attn` and every other tensor.

    Raises:
        InputError: the CLIP changes from one part of the sampling to the next (hooks), which cannot be trained under.
    """
    rows = []
    for prompt in prompts:
        with torch.inference_mode():
            encoded = clip.encode_from_tokens_scheduled(clip.tokenize(prompt), show_pbar=False)
        if len(encoded) != 1:
            raise InputError("the CLIP carries hooks that change it while sampling: train with a CLIP without them")
        tensor, options = encoded[0]
        tensors = {CROSS: tensor} | {name: value for name, value in options.items() if isinstance(value, Tensor)}
        # Out of inference mode, else nothing computed from them can be saved for backward.
        rows.append({name: value[0].cpu().clone() for name, value in tensors.items()})
    return rows


def rows_of(conditions: Conditions, count: int) -> list[dict[str, Tensor]]:
    """Return the rows of a batch's conditions (models/denoiser.py), without the names that a row has not."""
    return [
        {name: values[index] for name, values in conditions.items() if values[index] is not None}
        for index in range(count)
    ]


def condition_of(row: Row) -> list:
    """Return a row as a CONDITIONING of one entry, as CLIPTextEncode gives it."""
    options = {name: value[None] for name, value in row.items() if name != CROSS}
    return [[row[CROSS][None], options]]


@dataclass(frozen=True)
class Group:
    """Rows of a batch that share a forward pass, and the keyword arguments of `apply_model` for them."""

    rows: list[int]
    arguments: dict[str, Any]


def group_rows(model, noisy: Tensor, rows: Sequence[Row]) -> list[Group]:
    """Build the model's own conditions for every row, and join those that ComfyUI's sampler would join.

    Args:
        model: BaseModel.
        noisy: [b, …]; models take sizes from it.
        rows: b of them.
    """
    groups: list[tuple[list[int], list[dict]]] = []
    for index, row in enumerate(rows):
        condition = _build(model, noisy[:1], row)
        for indices, conditions in groups:
            if _can_join(conditions[0], condition):
                indices.append(index)
                conditions.append(condition)
                break
        else:
            groups.append(([index], [condition]))
    return [Group(indices, _join(conditions)) for indices, conditions in groups]


def _build(model, noisy: Tensor, row: Row) -> dict[str, Any]:
    converted = comfy.sampler_helpers.convert_cond(condition_of(row))
    with torch.no_grad():
        processed = comfy.samplers.process_conds(
            model, noisy.detach(), {"positive": converted}, noisy.device, latent_image=torch.zeros_like(noisy)
        )
    conditions = processed["positive"][0]["model_conds"]
    return {name: value.process_cond(batch_size=1, area=None) for name, value in conditions.items()}


def _can_join(first: dict[str, Any], other: dict[str, Any]) -> bool:
    return first.keys() == other.keys() and all(value.can_concat(other[name]) for name, value in first.items())


def _join(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = conditions
    if not others:
        return {name: value.cond for name, value in first.items()}
    return {name: value.concat([other[name] for other in others]) for name, value in first.items()}
