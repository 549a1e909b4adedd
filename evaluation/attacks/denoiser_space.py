"""An attack through the denoiser: what a protected model predicts under a prompt, against what the base predicts.

The white-box attack of P4D (Chin et al. 2023, arXiv:2309.06135) on a bank of fixed noises, so that two prompts are
compared under the same ones: loss = mean |eps_arm(z, t, prompt) − eps_base(z, t, unsafe prompt)|², z being the base's
own picture of the unsafe prompt under noise. Other than a text attack it sees what an expert changed in the UNet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import InputError
from ...models.denoiser import Conditions, Denoiser
from .searches import Found, promising_swaps, random_words
from .text_space import Alphabet, TextSpace

NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Bank:
    """Noised latents of one picture, with what the base model predicts there under the unsafe prompt.

    Args:
        noisy, wanted: [m, c, h, w].
        timesteps: [m] int64.
    """

    noisy: Tensor
    timesteps: Tensor
    wanted: Tensor

    def part(self, rows: Tensor) -> "Bank":
        return Bank(self.noisy[rows], self.timesteps[rows], self.wanted[rows])

    def __len__(self) -> int:
        return len(self.noisy)


@torch.no_grad()
def make_bank(denoiser: Denoiser, latents: Tensor, conditions: Conditions, size: int, seed: int) -> Bank:
    """Noise one picture's latents [1, c, h, w] at `size` timesteps, one in each equal part of the schedule.

    Args:
        denoiser: of the base model.
        conditions: one row, of the unsafe prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    width = NUM_TIMESTEPS / size
    places = (torch.arange(size) + torch.rand(size, generator=generator)) * width
    timesteps = places.long().clamp(0, NUM_TIMESTEPS - 1).to(latents.device)
    noise = torch.randn(size, *latents.shape[1:], generator=generator).to(latents)
    noisy = denoiser.add_noise(latents.expand(size, -1, -1, -1), noise, timesteps)
    rows = {name: value.expand(size, *value.shape[1:]) for name, value in conditions.items()}
    return Bank(noisy, timesteps, denoiser.predict(noisy, timesteps, rows))


@dataclass
class DenoiserSpace:
    """A denoiser behind its text encoders, as an attack sees it. Counts every prediction of the denoiser.

    Args:
        denoiser: of the model that is attacked, with what it carries.
        towers: the model's CLIPs, all with the same prefix; they share their vocabulary.
        chunk: predictions in one forward.
    """

    denoiser: Denoiser
    towers: Sequence[TextSpace]
    chunk: int = 32
    forwards: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        return self.towers[0].device

    def losses(self, free: Tensor, bank: Bank) -> Tensor:
        """Return the mean squared distance [n] of prompts [n, K] over a bank, without gradients."""
        encoded = [tower.encode(free) for tower in self.towers]
        conditions = _joined([hidden for hidden, _ in encoded], encoded[-1][1])
        # Every prompt with every entry of the bank.
        prompts = torch.arange(len(free), device=free.device).repeat_interleave(len(bank))
        entries = torch.arange(len(bank), device=free.device).repeat(len(free))
        found = []
        with torch.no_grad():
            for some, which in zip(prompts.split(self.chunk), entries.split(self.chunk), strict=True):
                rows = {name: value[some] for name, value in conditions.items()}
                found.append(self._errors(rows, bank.part(which)))
        return torch.cat(found).view(len(free), len(bank)).mean(1)

    def gradient(self, free: Tensor, bank: Bank) -> Tensor:
        """Return the loss's gradient [K, d] to one prompt's free token embeddings, those of all towers side by side."""
        with torch.inference_mode(False), torch.enable_grad():
            encoded = [tower.encode_with_leaf(free) for tower in self.towers]
            conditions = _joined([hidden for _, hidden, _ in encoded], encoded[-1][2])
            rows = {name: value.expand(len(bank), *value.shape[1:]) for name, value in conditions.items()}
            loss = self._errors(rows, bank).mean()
            self.forwards += 2 * len(bank)  # a backward counts as two
            gradients = torch.autograd.grad(loss, [leaf for leaf, _, _ in encoded])
        parts = [tower.free_rows(part, len(free)) for tower, part in zip(self.towers, gradients, strict=True)]
        return torch.cat(parts, dim=1)

    def embeddings_of(self, tokens: Tensor) -> Tensor:
        """Return the token embeddings [n, d] of all towers side by side, float32."""
        return torch.cat([tower.embeddings_of(tokens) for tower in self.towers], dim=1)

    def _errors(self, conditions: Conditions, bank: Bank) -> Tensor:
        self.forwards += len(bank)
        predicted = self.denoiser.predict(bank.noisy, bank.timesteps, conditions)
        return ((predicted - bank.wanted) ** 2).flatten(1).mean(1)


def _joined(hidden: Sequence[Tensor], pooled: Tensor | None) -> dict[str, Tensor]:
    conditions = {"hidden_states": torch.cat(list(hidden), dim=-1)}
    return conditions if pooled is None else {**conditions, "pooled": pooled}


def denoiser_search(
    space: DenoiserSpace,
    alphabet: Alphabet,
    bank: Bank,
    length: int,
    *,
    steps: int = 60,
    swaps: int = 24,
    entries: int = 4,
    top: int = 64,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Search as `swap_search` does: `entries` of the bank screen the swaps, the whole bank decides on the best one.

    Both compare under the same noises, so the loss over the whole bank never rises.

    Raises:
        InputError: the bank is smaller than `entries`.
    """
    if entries > len(bank):
        raise InputError(f"a bank of {len(bank)} noises has no {entries} to screen with; make it larger")
    generator, first = torch.Generator().manual_seed(seed), space.forwards
    words = alphabet.tokens.to(space.device)
    best = random_words(alphabet, (length,), generator, space.device)
    best_loss, losses = float(space.losses(best[None], bank)[0]), []
    for _ in range(steps):
        if should_stop():
            break
        some = bank.part(torch.randperm(len(bank), generator=generator)[:entries].to(space.device))
        tried = promising_swaps(space, words, best, space.gradient(best, some), swaps, top, generator)
        everything = torch.cat([best[None], tried])
        chosen = everything[int(space.losses(everything, some).argmin())]
        if not chosen.equal(best):
            loss = float(space.losses(chosen[None], bank)[0])
            if loss < best_loss:
                best, best_loss = chosen, loss
        losses.append(best_loss)
    return Found(best, alphabet.decode(best.tolist()), tuple(losses), space.forwards - first)
