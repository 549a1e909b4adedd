"""SAFREE on the states of a CLIP text encoder: words that carry a concept are projected out of a prompt's conditioning.

Two versions. `published`: the paper's (Yoon et al., arXiv:2410.12761) as its code runs for SD1. `repaired`: with what
is wrong there set right. Vectors are rows; h are a prompt's states [t, d], m_i the end token's state of the prompt with
word i left out, c_j that of concept phrases.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALPHA = 0.01
SHARE = 0.5
_LAST_STEPS, _PUBLISHED_STEPS = 10, 50  # the edit acts in at most 10 of the paper's 50 steps
_SMALLEST = 1e-4  # of singular values, relative to the largest


@dataclass(frozen=True)
class Edited:
    """A prompt's changed states.

    Attributes:
        states: [t, d].
        words: which of the words were found to carry the concept, from 0.
        until: the part of the sampling that the states are for; the prompt's own come after it.
    """

    states: Tensor
    words: tuple[int, ...]
    until: float = 1.0


def basis(vectors: Tensor) -> Tensor:
    """Return orthonormal rows [r, d] of the space that vectors [k, d] span."""
    _, sizes, rows = torch.linalg.svd(vectors.float(), full_matrices=False)
    return rows[sizes > _SMALLEST * sizes[:1].clamp(min=torch.finfo(torch.float32).tiny)]


def onto(space: Tensor, vectors: Tensor) -> Tensor:
    """Return the orthogonal projection of vectors [..., d] onto a space's basis [r, d]."""
    return (vectors @ space.T) @ space


def published(states: Tensor, without_word: Tensor, concepts: Tensor, alpha: float = ALPHA) -> Edited:
    """Return the states with the rows of triggers projected, for the first steps of the sampling.

    Word i is a trigger where the prompt without it is further from the concept space than the others are on average:
    d_i >= (1 + alpha) mean of d_j, j != i, d = |(I - P_C) m|. Its row becomes (I - P_C) P_I h. The more the projection
    changes the prompt's states, the longer the edit acts: t' = round(10 sigmoid(5 (10 beta - 5.333))) of 50 steps, beta
    one minus the mean cosine. Start, end and padding stay, though they carry the prompt too.

    Args:
        states: h [77, d]; row i + 1 is word i's.
        without_word: m [n, d].
        concepts: c [k, d].
    """
    concept_space, input_space = basis(concepts), basis(without_word)
    num_words = len(without_word)
    distances = (without_word - onto(concept_space, without_word)).norm(dim=1)
    others = (distances.sum() - distances) / max(num_words - 1, 1)
    is_trigger = (distances >= (1 + alpha) * others) if num_words > 1 else torch.zeros(num_words, dtype=torch.bool)
    inside = onto(input_space, states)
    projected = inside - onto(concept_space, inside)
    attended = slice(0, num_words + 2)
    beta = 1 - torch.cosine_similarity(states[attended], projected[attended], dim=1).mean()
    last_step = round(_LAST_STEPS * float(torch.sigmoid(5 * (10 * beta - 5.333))))
    words = is_trigger.nonzero().flatten().tolist()
    changed = states.clone()
    rows = [word + 1 for word in words]
    changed[rows] = projected[rows].to(changed)
    return Edited(changed, tuple(words), (last_step + 1) / _PUBLISHED_STEPS)


def repaired(
    states: Tensor,
    empty: Tensor,
    whole: Tensor,
    without_word: Tensor,
    concepts: Tensor,
    twins: Tensor,
    share: float = SHARE,
) -> Edited:
    """Return the states without the concept from the first word on that carries it, for the whole sampling.

    What differs, and why:

    - the concept space is spanned by differences c_j - s_j of phrases and their safe twins: as they stand, states have
      a large part in common, and with it everything else is projected out;
    - words count by the part of what they add to the prompt, |m - m_i|², that lies in the concept space: those with at
      least `share` of the largest such part. That is relative, as the published test is, so some word of a harmless
      prompt may count: a gate has to say first that the prompt asks for the concept;
    - all rows from that word on are changed, end and padding with them: CLIP reads from left to right, so they carry it
      too. Of each, only its difference from the empty prompt's row is projected, orthogonally: h - P_C (h - h_empty).

    Args:
        states: h [77, d]; row i + 1 is word i's.
        empty: of the empty prompt, [77, d].
        whole: the end token's state of the prompt, [d].
        without_word: m [n, d].
        concepts, twins: [k, d], the end tokens' states.
    """
    space = basis(concepts - twins)
    added = whole - without_word
    length = added.square().sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    parts = onto(space, added).square().sum(dim=1) / length
    words = ((parts > 0) & (parts >= share * parts.max())).nonzero().flatten().tolist()
    changed = states.clone()
    if words:
        first = words[0] + 1
        changed[first:] -= onto(space, (states - empty)[first:].float()).to(changed)
    return Edited(changed, tuple(words))
