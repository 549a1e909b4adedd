"""Prompts to conditions, as ComfyUI encodes an unweighted prompt: CLIP-L (SD1), OpenCLIP-H (SD2), L and G (SDXL).

SD3 and FLUX, which have T5 (t5.py) too, join them in their own files.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .clip_weights import ClipWeights
from .tokenizer import END_TOKEN
from .weights_file import fill

logger = logging.getLogger(__name__)

NUM_TOKENS = 77


@dataclass(frozen=True)
class ClipKind:
    """What the weights do not say about a CLIP text tower."""

    activation: str
    pad_token: int
    penultimate: bool
    """Take the output of the last layer but one, not of the last."""
    final_norm: bool
    """Apply the final layer norm to the output taken."""
    num_layers: int
    """Of the full model. A file with one layer less has left out the last one, which a penultimate kind never uses."""
    pooled: Literal["projected", "plain"] | None = None
    """It also gives a pooled embedding: the end token's output behind the final norm, projected or as it is."""


CLIP_L = ClipKind("quick_gelu", END_TOKEN, penultimate=False, final_norm=True, num_layers=12)
CLIP_H = ClipKind("gelu", 0, penultimate=True, final_norm=True, num_layers=24)
SDXL_CLIP_L = ClipKind("quick_gelu", END_TOKEN, penultimate=True, final_norm=False, num_layers=12)
SDXL_CLIP_G = ClipKind("gelu", 0, penultimate=True, final_norm=False, num_layers=32, pooled="projected")
SD3_CLIP_L = replace(SDXL_CLIP_L, pooled="plain")
FLUX_CLIP_L = replace(CLIP_L, pooled="plain")


class ClipTower:
    """One CLIP text model with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, kind: ClipKind):
        self.model, self.tokenizer, self.kind = model, tokenizer, kind

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [n, 77] int64: start, at most 75 tokens, end, padding."""
        rows = []
        for ids in self.tokenizer(list(prompts))["input_ids"]:
            if len(ids) > NUM_TOKENS:
                logger.warning(
                    "a prompt of %d tokens is cut to %d, all that is trained on", len(ids) - 2, NUM_TOKENS - 2
                )
                ids = [*ids[: NUM_TOKENS - 1], END_TOKEN]
            rows.append(ids + [self.kind.pad_token] * (NUM_TOKENS - len(ids)))
        return torch.tensor(rows)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [n, 77, width] and, where the kind has it, pooled [n, width]; both float32."""
        return self.encode_tokens(self.tokenize(prompts))

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Do as `encode` for token ids [n, 77] int64, on any device, with gradients where they are wanted."""
        text_model = _text_model(self.model)
        output = self.model(tokens.to(text_model.final_layer_norm.weight.device), output_hidden_states=True)
        is_cut = len(text_model.encoder.layers) == self.kind.num_layers - 1
        hidden = output.hidden_states[-2 if self.kind.penultimate and not is_cut else -1]
        if self.kind.final_norm:
            hidden = text_model.final_layer_norm(hidden)
        if not self.kind.pooled:
            return hidden.float(), None
        pooled = output.text_embeds if self.kind.pooled == "projected" else output.pooler_output
        return hidden.float(), pooled.float()


class TextEncoder:
    """The text encoders of a checkpoint. SDXL has two, whose hidden states are joined; the last one gives `pooled`."""

    def __init__(self, towers: Sequence[ClipTower]):
        self.towers = tuple(towers)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what a UNet is conditioned on, as ComfyUI gives it for prompts without weights, cut to 77 tokens.

        Args:
            prompts: n strings; the empty one is the unconditional prompt.

        Returns:
            `hidden_states` [n, 77, 768 | 1024 | 2048] and, for SDXL, `pooled` [n, 1280]; float32, on the encoder's
            device.
        """
        encoded = [tower.encode(prompts) for tower in self.towers]
        conditions = {"hidden_states": torch.cat([hidden for hidden, _ in encoded], dim=-1)}
        if encoded[-1][1] is not None:
            conditions["pooled"] = encoded[-1][1]
        return conditions


def load_tower(
    weights: ClipWeights, kind: ClipKind, tokenizer: Any, dtype: torch.dtype, device: torch.device | str
) -> ClipTower:
    """Build a tower whose sizes are read from its weights.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # where needed: seconds

    vocabulary, width = weights.shape("text_model.embeddings.token_embedding.weight")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=weights.num_layers,
        num_attention_heads=width // 64,
        max_position_embeddings=weights.shape("text_model.embeddings.position_embedding.weight")[0],
        hidden_act=kind.activation,
        projection_dim=weights.shape("text_projection.weight")[0] if kind.pooled == "projected" else width,
        eos_token_id=END_TOKEN,
    )
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if kind.pooled == "projected" else CLIPTextModel)(config)

    def read(key: str) -> Tensor:  # transformers 5 dropped `text_model.` from the plain model's keys
        return weights.tensor(key if key.startswith("text_") else f"text_model.{key}")

    fill(model, read, dtype, device, weights.file.path)
    embeddings = _text_model(model).embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings, device=device)[None]  # was on meta
    return ClipTower(model, tokenizer, kind)


def _text_model(model: nn.Module) -> Any:
    return getattr(model, "text_model", model)
