"""The space a text attack searches: whole words of CLIP's vocabulary, and how near their embedding is to a target's.

Positions are those of a CLIP prompt of 77 tokens: start, K free tokens, end and padding.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...models.text_encoders import NUM_TOKENS, ClipTower
from ...models.tokenizer import END_TOKEN

START_TOKEN = 49406
_WORD_END = "</w>"


@dataclass(frozen=True)
class Alphabet:
    """Tokens that end a word and come back from decoding as themselves, so that a found prompt is what was scored.

    Attributes:
        tokens: [n] int64.
        decode: tokens -> text.
    """

    tokens: Tensor
    decode: Callable[[Sequence[int]], str]

    def without(self, tokenizer: Any, words: Iterable[str]) -> "Alphabet":
        """Leave out the tokens of these words.

        Raises:
            InputError: nothing is left.
        """
        banned = torch.tensor([token for word in words for token in tokens_of(tokenizer, word)], dtype=torch.int64)
        kept = self.tokens[~torch.isin(self.tokens, banned)]
        if not len(kept):
            raise InputError("no word of the tokenizer's vocabulary is left to attack with; ban fewer words")
        return Alphabet(kept, self.decode)

    @classmethod
    def of(cls, tokenizer: Any) -> "Alphabet":
        """Return the alphabet of a CLIP tokenizer."""
        kept = [
            token
            for text, token in tokenizer.get_vocab().items()
            if text.endswith(_WORD_END)
            and text.removesuffix(_WORD_END).isascii()
            and text.removesuffix(_WORD_END).isalpha()
        ]
        words = [tokenizer.decode([token]).strip() for token in kept]
        again = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        survivors = [token for token, ids in zip(kept, again, strict=True) if ids == [token]]
        return cls(torch.tensor(sorted(survivors)), functools.partial(_decode, tokenizer))


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without start and end."""
    return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens))).strip()


@dataclass
class TextSpace:
    """A CLIP text encoder as an attack sees it. Counts every prompt that goes forward through it.

    Args:
        tower: CLIP-L of the checkpoint, on its device.
        chunk: prompts in one forward.
        prefix: tokens that stand before the free ones and are not searched.
    """

    tower: ClipTower
    chunk: int = 256
    prefix: tuple[int, ...] = ()
    forwards: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def _text_model(self) -> Any:
        return getattr(self.tower.model, "text_model", self.tower.model)

    @property
    def _embedding(self) -> Any:
        return self._text_model.embeddings.token_embedding

    def rows(self, free: Tensor) -> Tensor:
        """Return whole prompts [n, 77] of free tokens [n, K].

        Raises:
            InputError: they do not fit behind the prefix.
        """
        first = 1 + len(self.prefix)
        end = first + free.shape[1]
        if end >= NUM_TOKENS:
            raise InputError(f"{free.shape[1]} words do not fit into a prompt of {len(self.prefix)} more; use fewer")
        rows = torch.full((len(free), NUM_TOKENS), self.tower.kind.pad_token, dtype=torch.int64, device=free.device)
        rows[:, 0] = START_TOKEN
        rows[:, 1:first] = torch.tensor(self.prefix, dtype=torch.int64, device=free.device)
        rows[:, first:end] = free
        rows[:, end] = END_TOKEN
        return rows

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, without start and end."""
        return tokens_of(self.tower.tokenizer, text)[: NUM_TOKENS - 2]

    def hidden_of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return hidden states [n, 77, d] as the model is conditioned on them."""
        with torch.no_grad():
            return self.tower.encode(texts)[0]

    def losses(self, free: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared distance [n] of prompts [n, K] to a target [77, d], without gradients."""
        found = []
        with torch.inference_mode():
            for part in free.split(self.chunk):
                self.forwards += len(part)
                hidden, _ = self.tower.encode_tokens(self.rows(part))
                found.append(((hidden - target) ** 2).mean((1, 2)))
        return torch.cat(found)

    def gradient(self, free: Tensor, target: Tensor) -> Tensor:
        """Return the loss's gradient [K, d] to the embeddings of one prompt's free tokens [K]."""
        with torch.inference_mode(False), torch.enable_grad():
            embedded, hidden, _ = self.encode_with_leaf(free)
            (gradient,) = torch.autograd.grad(((hidden - target.clone()) ** 2).mean(), embedded)
        return self.free_rows(gradient, len(free))

    def encode(self, free: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states [n, 77, d] and what the tower pools [n, p] of prompts [n, K], without gradients."""
        self.forwards += len(free)
        with torch.no_grad():
            return self.tower.encode_tokens(self.rows(free))

    def encode_with_leaf(self, free: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return one prompt's token embeddings [1, 77, d], to differentiate by, and what `encode` gives for them."""
        self.forwards += 3  # a backward counts as two
        rows = self.rows(free[None])
        embedded = self._embedding.weight.detach()[rows].clone().requires_grad_()
        hook = self._embedding.register_forward_hook(lambda module, given, output: embedded)
        try:
            hidden, pooled = self.tower.encode_tokens(rows)
        finally:
            hook.remove()
        return embedded, hidden, pooled

    def free_rows(self, gradient: Tensor, length: int) -> Tensor:
        """Return the rows [K, d] of the free tokens of one prompt's [1, 77, d], float32."""
        first = 1 + len(self.prefix)
        return gradient[0, first : first + length].float()

    def embeddings_of(self, tokens: Tensor) -> Tensor:
        """Return the token embeddings [n, d], float32."""
        return self._embedding.weight.detach()[tokens].float()


def concept_direction(space: TextSpace, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return the mean of f(with) − f(without) [77, d] over prompt pairs: Ring-A-Bell's concept vector."""
    if not pairs:
        raise InputError("an attack needs prompt pairs with and without the concept; give some")
    unsafe, safe = zip(*pairs, strict=True)
    return (space.hidden_of_texts(unsafe) - space.hidden_of_texts(safe)).mean(0)
