"""The reference model's predictions, each computed once: in memory, and on disk for the next run on the same data.

They can be kept because a recipe with `reference_epochs` repeats its noises and timesteps, and because the reference
never changes: two recipes that differ only in objective, beta or learning rate share every prediction.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tensor_store import TensorStore

_ENTRIES_PER_SHARD = 64


class ReferenceBank:
    """Remembers predictions by what went into the model.

    Args:
        fingerprint: of the model and the precision it computes in; part of every key.
        store: keeps them on disk; None keeps them in memory only.
    """

    def __init__(self, fingerprint: str = "", store: TensorStore | None = None):
        self._fingerprint, self._store = fingerprint, store
        self._in_memory: dict[str, Tensor] = {}

    def predict(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: Sequence[str], compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return the prediction for these CPU tensors and prompts; `compute` is called the first time only."""
        key = self._key(latents, noise, timesteps, prompts)
        if key in self._in_memory:
            return self._in_memory[key].float()
        if self._store is not None and key in self._store:
            return self._store[key].float()
        prediction = compute()
        kept = prediction.cpu()
        halved = kept.bfloat16()  # what a bfloat16 model gives loses nothing
        self._in_memory[key] = halved if torch.equal(halved.float(), kept) else kept
        if len(self._in_memory) >= _ENTRIES_PER_SHARD:
            self.flush()
        return prediction

    def flush(self) -> None:
        """Move what is in memory to disk, if there is a store.

        Raises:
            SafetyExpertsError: the disk is full.
        """
        if self._store is not None and self._in_memory:
            self._store.add_shard(self._in_memory)
            self._in_memory = {}

    def _key(self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> str:
        digest = hashlib.sha256(repr((self._fingerprint, tuple(latents.shape), tuple(prompts))).encode())
        for tensor in (latents, noise, timesteps):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:32]
