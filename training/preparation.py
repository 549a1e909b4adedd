"""What a training run needs before its first step: the dataset encoded, the model with a fresh LoRA."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..devices import encoding_dtype
from ..experts.expert import Expert
from ..experts.in_weights import add_to_weights
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset, PreferencePair
from .cache import PairCache
from .lora import attach_lora
from .policy import LoraPolicy
from .processes import Processes
from .recipe import Recipe
from .reference_bank import ReferenceBank
from .retained import RetainedPrompts
from .tensor_store import TensorStore


@torch.no_grad()
def encode_dataset(
    dataset: PreferenceDataset,
    pairs: Sequence[PreferencePair],
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str, int, int], None],
    retained: RetainedPrompts | None = None,
) -> PairCache:
    """Return the cache of latents and prompts; `on_progress` takes the stage ("images", "prompts"), done and total."""
    cache = PairCache(dataset, checkpoint, device, encoding_dtype(device, dtype), recipe.resolution)
    cache.encode_pairs(pairs, flips=recipe.horizontal_flip, on_progress=partial(on_progress, "images"))
    prompts = ["", *(pair.prompt for pair in pairs), *(pair.safe_prompt for pair in pairs)]
    prompts += [prompt for group in (retained or {}).values() for prompt in group]
    cache.encode_prompts(prompts, on_progress=partial(on_progress, "prompts"))
    return cache


def open_bank(
    cache: PairCache, recipe: Recipe, with_experts: Sequence[Expert], dtype: torch.dtype, processes: Processes
) -> ReferenceBank | None:
    """Return where the reference's predictions are kept, beside the dataset's cache; None if draws never repeat."""
    if not recipe.reference_epochs:
        return None
    # Each process has its own rows of a batch, so nothing is gained by sharing a file.
    store = TensorStore(cache.folder, f"reference-{processes.rank}of{processes.count}")
    experts = [expert.tensors_sha256() for expert in with_experts]
    base = cache.checkpoint.id
    origin = (base.sha256, base.files, base.patches, dtype, recipe.flow_error, recipe.anchor_samples, experts)
    return ReferenceBank(repr(origin), store)


def tune_for_device(model: nn.Module, device: torch.device) -> None:
    """Choose what is fastest on a device and computes the same."""
    if device.type == "cpu" and hasattr(model, "set_attn_processor"):
        from diffusers.models.attention_processor import Attention, AttnProcessor

        # The backward pass of torch's fused attention takes a third of a step on a CPU, at the sizes a CPU can train.
        for module in model.modules():
            if isinstance(module, Attention) and module.processor.__class__.__name__ == "AttnProcessor2_0":
                module.set_processor(AttnProcessor())


def load_policy(
    checkpoint: Checkpoint,
    recipe: Recipe,
    with_experts: Sequence[Expert],
    device: torch.device,
    dtype: torch.dtype,
) -> LoraPolicy:
    """Return the checkpoint's model with these experts as part of it and a fresh LoRA: a PolicyLoader.

    Raises:
        InputError: an expert belongs to another model.
    """
    model = checkpoint.load_model(dtype=dtype, device=device)
    prepare_policy(model, recipe, with_experts, device)
    autocast_dtype = dtype if dtype != torch.float32 else None
    return LoraPolicy(checkpoint.make_denoiser(model, autocast_dtype, recipe.flow_error), recipe.lora_alpha)


def prepare_policy(model: Any, recipe: Recipe, with_experts: Sequence[Expert], device: torch.device) -> None:
    """Give a model these experts as part of it, a fresh LoRA, and what the recipe says of speed and memory."""
    tune_for_device(model, device)
    for expert in with_experts:
        add_to_weights(model, expert)
    attach_lora(model, recipe)
    if recipe.gradient_checkpointing:
        model.train()  # diffusers checkpoints in training mode only; these models have no dropout
        model.enable_gradient_checkpointing()
    if recipe.compile:
        model.compile()
