"""T5, which SD3 and FLUX have beside CLIP, as ComfyUI encodes an unweighted prompt."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .tokenizer import T5_END
from .weights_file import WeightsFile, fill

logger = logging.getLogger(__name__)

T5_PAD = 0


class T5Tower:
    """A T5 encoder with its tokenizer.

    Args:
        num_tokens: what prompts are padded to, as ComfyUI does, and cut to, where ComfyUI goes on.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, num_tokens: int):
        self.model, self.tokenizer, self.num_tokens = model, tokenizer, num_tokens

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [n, num_tokens] int64: the prompt, end, padding."""
        rows = []
        for ids in self.tokenizer(list(prompts))["input_ids"]:
            if len(ids) > self.num_tokens:
                logger.warning(
                    "a prompt of %d T5 tokens is cut to %d, all that is trained on", len(ids) - 1, self.num_tokens - 1
                )
                ids = [*ids[: self.num_tokens - 1], T5_END]
            rows.append(ids + [T5_PAD] * (self.num_tokens - len(ids)))
        return torch.tensor(rows)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return hidden states [n, num_tokens, width] float32. Padding is attended to: the models were trained so."""
        tokens = self.tokenize(prompts).to(next(self.model.parameters()).device)
        return self.model(tokens).last_hidden_state.float()


def load_t5(file: WeightsFile, prefix: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Build a T5 v1.1 encoder whose sizes are read from its weights (transformers' names under `prefix`).

    Raises:
        InputError: a weight is missing or has another shape.
    """
    from transformers import T5Config, T5EncoderModel  # imported where needed: it takes seconds

    shapes = file.shapes(prefix)
    vocabulary, width = shapes["shared.weight"]
    first = "encoder.block.0.layer"
    num_heads = file.tensor(f"{prefix}{first}.0.SelfAttention.relative_attention_bias.weight").shape[1]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=file.tensor(f"{prefix}{first}.0.SelfAttention.q.weight").shape[0] // num_heads,
        d_ff=file.tensor(f"{prefix}{first}.1.DenseReluDense.wi_0.weight").shape[0],
        num_layers=len({match[1] for key in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", key))}),
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    fill(model, lambda key: file.tensor(prefix + _shared(key)), dtype, device, file.path)
    model.encoder.embed_tokens = model.shared
    return model


def _shared(key: str) -> str:
    return "shared.weight" if key == "encoder.embed_tokens.weight" else key
