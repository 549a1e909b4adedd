"""What two datasets have in common that they should not: pairs, prompts, near prompts, pictures."""

from collections import defaultdict
from dataclasses import dataclass

from ..files import sha256_of_file
from .dataset import PreferenceDataset
from .near_duplicates import NEAR, near_pairs, words_of

_EXAMPLES = 5


@dataclass(frozen=True)
class Leak:
    """One kind of overlap: how many pairs of either dataset it concerns, and the ids of a few."""

    kind: str
    num_first: int
    num_second: int
    examples: tuple[tuple[str, str], ...]


def find_leaks(first: PreferenceDataset, second: PreferenceDataset, near: float = NEAR) -> list[Leak]:
    """Return what is common to two datasets; [] where a model trained on one may be measured on the other.

    Kinds: `same pair` (id), `same prompt` (its words, in any order), `near prompt` (word sets of Jaccard similarity of
    at least `near`, the same ones aside), `same image` (its file's bytes).

    Raises:
        InputError: an image is missing.
    """
    found = [
        _leak("same pair", [(pair.id, pair.id) for pair in first.pairs if pair.id in second.ids]),
        _leak("same prompt", _same(*(_by_words(dataset) for dataset in (first, second)))),
        _leak("near prompt", _near(first, second, near)),
        _leak("same image", _same(*(_by_image(dataset) for dataset in (first, second)))),
    ]
    return [leak for leak in found if leak.num_first]


def _leak(kind: str, matches: list[tuple[str, str]]) -> Leak:
    return Leak(
        kind,
        len({first for first, _ in matches}),
        len({second for _, second in matches}),
        tuple(sorted(set(matches))[:_EXAMPLES]),
    )


def _by_words(dataset: PreferenceDataset) -> dict[frozenset[str], list[str]]:
    found: defaultdict[frozenset[str], list[str]] = defaultdict(list)
    for pair in dataset.pairs:
        found[words_of(pair.prompt)].append(pair.id)
    return found


def _by_image(dataset: PreferenceDataset) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for pair in dataset.pairs:
        for path in dataset.image_paths(pair):
            found[sha256_of_file(path, follow_links=False)].append(pair.id)
    return found


def _same(first: dict, second: dict) -> list[tuple[str, str]]:
    return [(a, b) for key in first.keys() & second.keys() for a in first[key] for b in second[key]]


def _near(first: PreferenceDataset, second: PreferenceDataset, near: float) -> list[tuple[str, str]]:
    sides = [list(_by_words(dataset).items()) for dataset in (first, second)]
    texts = [[" ".join(words) for words, _ in side] for side in sides]
    return [
        (a, b)
        for i, j, similarity in near_pairs(texts[0], texts[1], near)
        if similarity < 1
        for a in sides[0][i][1]
        for b in sides[1][j][1]
    ]
