"""Searches for a prompt whose text embedding is near a target: the published one, a faster one, and a control.

Ring-A-Bell (Tsai et al., ICLR 2024) asks for a prompt near f(P) + eta · c, c being the mean difference that the concept
makes in other prompts. All searches score candidates by the same loss, keep the best they saw, and count forwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .text_space import Alphabet, TextSpace

OnStep = Callable[[int, float], None]  # forwards so far, best loss


@dataclass(frozen=True)
class Found:
    """The best prompt a search has seen.

    Attributes:
        tokens: [K] free tokens; `text` decodes to them.
        losses: best loss after each step: it never rises.
        forwards: prompts that went through the text encoder.
    """

    tokens: Tensor
    text: str
    losses: tuple[float, ...]
    forwards: int


def random_words(
    alphabet: Alphabet, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Tensor:
    return alphabet.tokens[torch.randint(len(alphabet.tokens), shape, generator=generator)].to(device)


def random_search(
    space: TextSpace, alphabet: Alphabet, target: Tensor, length: int, candidates: int, seed: int
) -> Found:
    """Score so many random prompts and keep the best: the control of the other searches."""
    generator, start = torch.Generator().manual_seed(seed), space.forwards
    best, best_loss, losses = torch.empty(0), float("inf"), []
    for size in _chunks(candidates, space.chunk):
        drawn = random_words(alphabet, (size, length), generator, space.device)
        scores = space.losses(drawn, target)
        if float(scores.min()) < best_loss:
            best_loss, best = float(scores.min()), drawn[int(scores.argmin())]
        losses.append(best_loss)
    return Found(best, alphabet.decode(best.tolist()), tuple(losses), space.forwards - start)


def published_search(
    space: TextSpace,
    alphabet: Alphabet,
    target: Tensor,
    length: int,
    *,
    population: int = 200,
    generations: int = 3000,
    seed: int = 0,
    start: Tensor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Search as Ring-A-Bell does: crossover of the better half, mutation at .25; the best eighth is never changed.

    Args:
        start: [n, length] tokens to begin from besides random ones.
    """
    generator, first = torch.Generator().manual_seed(seed), space.forwards
    genomes = random_words(alphabet, (population, length), generator, space.device)
    if start is not None:
        genomes[: len(start)] = start.to(genomes)
    scores = space.losses(genomes, target)
    elites, losses = max(1, population // 8), []
    for _ in range(generations):
        if should_stop():
            break
        order = scores.argsort()
        genomes, scores = genomes[order], scores[order]
        children = population - elites
        parents = torch.randint(max(2, population // 2), (2, children), generator=generator).to(space.device)
        cut = torch.randint(1, max(2, length), (children, 1), generator=generator).to(space.device)
        mixed = torch.where(torch.arange(length, device=space.device) < cut, genomes[parents[0]], genomes[parents[1]])
        mutates = torch.rand(children, generator=generator).to(space.device) < 0.25
        place = torch.randint(length, (children,), generator=generator).to(space.device)
        fresh = random_words(alphabet, (children,), generator, space.device)
        rows = torch.arange(children, device=space.device)
        mixed[rows[mutates], place[mutates]] = fresh[mutates]
        genomes = torch.cat([genomes[:elites], mixed])
        scores = torch.cat([scores[:elites], space.losses(mixed, target)])
        losses.append(float(scores.min()))
    best = genomes[int(scores.argmin())]
    return Found(best, alphabet.decode(best.tolist()), tuple(losses), space.forwards - first)


def swap_search(
    space: TextSpace,
    alphabet: Alphabet,
    target: Tensor,
    length: int,
    *,
    steps: int = 150,
    swaps: int = 256,
    top: int = 64,
    seed: int = 0,
    start: Tensor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Found:
    """Search by the gradient: it scores every (position, word) to first order, the most promising swaps are tried.

    Args:
        swaps: tried in one forward a step.
        top: words considered at each position.
        start: [length] tokens to begin from; None draws them.
    """
    generator, first = torch.Generator().manual_seed(seed), space.forwards
    best = random_words(alphabet, (length,), generator, space.device) if start is None else start.to(space.device)
    best_loss = float(space.losses(best[None], target)[0])
    words = alphabet.tokens.to(space.device)
    losses = []
    for _ in range(steps):
        if should_stop():
            break
        tried = promising_swaps(space, words, best, space.gradient(best, target), swaps, top, generator)
        scores = space.losses(tried, target)
        if float(scores.min()) < best_loss:
            best_loss, best = float(scores.min()), tried[int(scores.argmin())]
        losses.append(best_loss)
    return Found(best, alphabet.decode(best.tolist()), tuple(losses), space.forwards - first)


def promising_swaps(
    space: Any, words: Tensor, best: Tensor, gradient: Tensor, swaps: int, top: int, generator: torch.Generator
) -> Tensor:
    """Return `swaps` variants [n, K] of a prompt [K], one word exchanged in each, drawn among the best to first order.

    Args:
        space: with `embeddings_of`, which gives the vectors that `gradient` [K, d] is of.
        words: [m] tokens to put in.
        top: words considered at each position.
    """
    length, device = len(best), best.device
    gain = (space.embeddings_of(best) * gradient).sum(1, keepdim=True) - gradient @ space.embeddings_of(words).T
    candidates = gain.topk(min(top, len(words)), dim=1).indices  # [K, top]
    place = torch.randint(length, (swaps,), generator=generator).to(device)
    which = torch.randint(candidates.shape[1], (swaps,), generator=generator).to(device)
    # Always the first choice of each position too.
    count = min(length, swaps)
    place[:count], which[:count] = torch.arange(count, device=device), 0
    tried = best.repeat(swaps, 1)
    tried[torch.arange(swaps, device=device), place] = words[candidates[place, which]]
    return tried


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
