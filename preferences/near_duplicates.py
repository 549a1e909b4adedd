"""Which prompts say nearly the same: Jaccard similarity of their word sets, exact, without comparing all with all."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

NEAR = 0.8


def words_of(text: str) -> frozenset[str]:
    """Return the words of a prompt, lower case."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def near_pairs(
    texts: Sequence[str], others: Sequence[str] | None = None, threshold: float = NEAR
) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, similarity) wherever |words of both| / |words of either| is at least `threshold`.

    Two sets that similar share one of their rarest words: of n words the first n - ⌈threshold · n⌉ + 1 in order of
    rarity are enough to find every partner (prefix filtering, as in Bayardo et al. 2007).

    Args:
        texts: i counts these.
        others: j counts these; None compares `texts` with themselves, i < j.
        threshold: above 0, at most 1.
    """
    left = [words_of(text) for text in texts]
    right = left if others is None else [words_of(text) for text in others]
    counts = Counter(word for words in [*left, *([] if others is None else right)] for word in words)
    index: defaultdict[str, list[int]] = defaultdict(list)
    for place, words in enumerate(right):
        for word in _prefix(words, counts, threshold):
            index[word].append(place)
    for i, words in enumerate(left):
        candidates = {place for word in _prefix(words, counts, threshold) for place in index[word]}
        for j in sorted(candidates):
            if others is None and j <= i:
                continue
            similarity = len(words & right[j]) / len(words | right[j])
            if similarity >= threshold:
                yield i, j, similarity


def _prefix(words: frozenset[str], counts: Counter[str], threshold: float) -> list[str]:
    by_rarity = sorted(words, key=lambda word: (counts[word], word))
    return by_rarity[: len(words) - math.ceil(threshold * len(words) - 1e-9) + 1]


def group_near(texts: Sequence[str], threshold: float = NEAR) -> list[list[int]]:
    """Return the numbers of `texts` in groups, ordered by their first: near ones together, also by way of others."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    parents = list(range(len(distinct)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for i, j, _ in near_pairs(list(distinct), threshold=threshold):
        parents[root(j)] = root(i)
    groups: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(root(distinct[text]), []).append(place)
    return list(groups.values())
