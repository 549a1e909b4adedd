"""Soft-prompt experts: a few token vectors behind every prompt, trained as an expert is; no weight changes.

The idea is PromptGuard's (arXiv:2501.03544): an embedding of a few kilobytes that every UI loads. Its loss pushes the
error on unsafe images up without end; here it is the recipe's preference objective with the anchor, which is bounded.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import compute_dtype
from ..errors import InputError, SafetyExpertsError
from ..experts.expert import LoraLayer
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Conditions, Denoiser
from ..models.text_encoders import NUM_TOKENS, ClipTower
from ..models.tokenizer import END_TOKEN
from ..preferences.dataset import PreferenceDataset
from ..tensor_file import write_tensors
from .batches import BatchPlan
from .cache import PairCache
from .preparation import encode_dataset, tune_for_device
from .recipe import Recipe
from .step_loss import batch_loss

# Family -> the names that ComfyUI, A1111 and diffusers know the vectors of its text encoders by.
FILE_KEYS = {"sd15": ("emb_params",), "sdxl": ("clip_l", "clip_g")}
LEARNING_RATE = 0.005
_TOKENS = "soft_prompt_tokens"
_PLACE = 0  # a token that stands where the vectors go
OnStep = Callable[[int, int, dict[str, float]], None]


class SoftPromptTower:
    """A CLIP tower with vectors of its own behind each prompt.

    Args:
        num_vectors: k.
        word: what they begin as.
    """

    def __init__(self, tower: ClipTower, num_vectors: int, word: str):
        self._tower = tower
        tower.model.requires_grad_(False)
        self._embedding = getattr(tower.model, "text_model", tower.model).embeddings.token_embedding
        token = tower.tokenizer([word], add_special_tokens=False)["input_ids"][0][0]
        start = self._embedding.weight.detach()[token].float().clone()
        self.vectors = nn.Parameter(start.repeat(num_vectors, 1))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [n, 77] with k places behind the words; a prompt that leaves no room for them is cut."""
        rows = self._tower.tokenize(prompts)
        places = len(self.vectors)
        end = (rows == END_TOKEN).int().argmax(dim=1).clamp(max=NUM_TOKENS - 1 - places)
        for row, first in zip(rows, end.tolist(), strict=True):
            row[first : first + places] = _PLACE
            row[first + places] = END_TOKEN
            row[first + places + 1 :] = self._tower.kind.pad_token
        return rows

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the tower gives for ids of `tokens`, with gradients to the vectors."""
        places = len(self.vectors)
        end = (tokens == END_TOKEN).int().argmax(dim=1)
        position = torch.arange(NUM_TOKENS, device=tokens.device)
        is_place = (position >= (end - places)[:, None]) & (position < end[:, None])

        def put(module: nn.Module, given: tuple, output: Tensor) -> Tensor:
            vectors = self.vectors.to(output).repeat(len(tokens), 1)
            return output.masked_scatter(is_place[..., None].to(output.device), vectors)

        hook = self._embedding.register_forward_hook(put)
        try:
            return self._tower.encode_tokens(tokens)
        finally:
            hook.remove()


class _TokenCache(PairCache):
    """A cache whose conditions hold the prompts' tokens too, from which the policy's own are made."""

    towers: Sequence[SoftPromptTower] = ()

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        tokens = torch.cat([tower.tokens(prompts) for tower in self.towers], dim=1)
        return {**super().conditions(prompts), _TOKENS: tokens}


class _SoftPromptDenoiser:
    """A denoiser that sees every prompt with the vectors behind it, and as it stands while `is_reference`."""

    def __init__(self, denoiser: Any, towers: Sequence[SoftPromptTower]):
        self._denoiser, self._towers = denoiser, towers
        self.is_reference = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        given = dict(conditions)
        tokens = given.pop(_TOKENS)
        return self._denoiser.predict(noisy, timesteps, given if self.is_reference else self._encode(tokens))

    def _encode(self, tokens: Tensor) -> dict[str, Tensor]:
        rows, place = torch.unique(tokens, dim=0, return_inverse=True)  # both images of a pair have one prompt
        encoded = [tower.encode(part) for tower, part in zip(self._towers, rows.split(NUM_TOKENS, dim=1), strict=True)]
        conditions = {"hidden_states": torch.cat([hidden for hidden, _ in encoded], dim=-1)[place]}
        if (pooled := encoded[-1][1]) is not None:
            conditions["pooled"] = pooled[place]
        return conditions


class SoftPromptPolicy:
    """Vectors in training on a model that stays as it is (see policy.Policy)."""

    def __init__(self, denoiser: Denoiser, towers: Sequence[SoftPromptTower]):
        denoiser.model.requires_grad_(False)
        self._denoiser = _SoftPromptDenoiser(denoiser, towers)
        self.denoiser: Any = self._denoiser
        self.parameters = {str(number): tower.vectors for number, tower in enumerate(towers)}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self._denoiser.is_reference = True
        try:
            yield
        finally:
            self._denoiser.is_reference = False

    def read_layers(self) -> dict[str, LoraLayer]:
        return {}

    def close(self) -> None:
        pass


def train_soft_prompt(
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: Path,
    *,
    category: str | None = None,
    num_vectors: int = 1,
    word: str = "safe",
    device: torch.device | str = "cpu",
    on_step: OnStep = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train vectors and save them as an embedding file; return the metrics of each step.

    Args:
        recipe: its objective, anchor, steps, batches and learning rate; what it says of a LoRA has no meaning here.
        num_vectors: tokens that each prompt is longer by.
        word: what the vectors begin as.
        should_stop: ends it early; what was reached is saved.

    Raises:
        InputError: the model is of another family, or the dataset has no pairs of the category.
        SafetyExpertsError: the loss is not finite; nothing is written.
    """
    if checkpoint.family not in FILE_KEYS:
        raise InputError(
            f"{checkpoint.name} is {checkpoint.family}; soft prompts are for {' and '.join(FILE_KEYS)}, whose text "
            "encoders are CLIP alone"
        )
    if not 1 <= num_vectors <= 32:
        raise InputError(f"{num_vectors} vectors: give 1 to 32; each prompt is longer by so many tokens")
    target = torch.device(device)
    dtype = compute_dtype(target, recipe.precision)
    pairs = dataset.training_pairs(category, recipe.pairs)
    encode_dataset(dataset, pairs, checkpoint, recipe, target, dtype, lambda *_: None)
    cache = _TokenCache(dataset, checkpoint, target, dtype, recipe.resolution)
    encoder = checkpoint.load_text_encoder(dtype=torch.float32, device=target)
    towers = [SoftPromptTower(tower, num_vectors, word) for tower in encoder.towers]
    cache.towers = towers
    model = checkpoint.load_model(dtype=dtype, device=target)
    tune_for_device(model, target)
    policy = SoftPromptPolicy(checkpoint.make_denoiser(model, None if dtype == torch.float32 else dtype), towers)
    records = _loop(policy, BatchPlan(pairs, cache, recipe), cache, recipe, target, on_step, should_stop)
    about = {"categories": [category] if category else [], "steps": len(records), "base": checkpoint.sha256}
    vectors = [tower.vectors.detach().cpu().float() for tower in towers]
    named = dict(zip(FILE_KEYS[checkpoint.family], vectors, strict=True))
    write_tensors(out_path, named, {"safety_experts_soft_prompt": json.dumps(about, sort_keys=True)})
    return records


def _loop(
    policy: SoftPromptPolicy,
    plan: BatchPlan,
    cache: PairCache,
    recipe: Recipe,
    device: torch.device,
    on_step: OnStep,
    should_stop: Callable[[], bool],
) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    records: list[dict[str, float]] = []
    for step in range(recipe.steps):
        if should_stop():
            break
        loss, metrics = batch_loss(policy, cache, plan.batch(step), recipe, device)
        if not torch.isfinite(loss):
            raise SafetyExpertsError(f"the loss is not finite at step {step + 1}; use a smaller learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        records.append(metrics)
        on_step(step + 1, recipe.steps, metrics)
    return records
