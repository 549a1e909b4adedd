"""Parts of a dataset between which nothing leaks: one prompt, and prompts near to it, stand in one part only."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from .dataset import PreferenceDataset, PreferencePair
from .near_duplicates import NEAR, group_near, words_of
from .whole_folder import whole_folder, write_dataset


def split_pairs(
    pairs: list[PreferencePair], parts: Mapping[str, float], *, near: float = NEAR, seed: int = 0
) -> dict[str, list[PreferencePair]]:
    """Return part -> its pairs, in file order: the same pairs, parts, `near` and seed give the same parts.

    Groups of near prompts are drawn whole, the large ones first, each into the part that lacks most of the group's
    categories; so a part comes near its share of every category, as far as the groups allow.

    Args:
        parts: name -> share; the shares are taken relative to their sum.
        near: prompts whose words agree by this Jaccard similarity are one group; 1: only the same words.

    Raises:
        InputError: a part stays empty.
    """
    total = sum(parts.values())
    groups = [[pairs[number] for number in group] for group in group_near([_text(pair) for pair in pairs], near)]
    groups.sort(key=lambda group: (-len(group), _order(group, seed)))
    in_all = Counter(name for pair in pairs for name in _labels(pair))
    have: dict[str, Counter[str]] = {name: Counter() for name in parts}
    chosen: defaultdict[str, set[str]] = defaultdict(set)
    for group in groups:
        labels = Counter(name for pair in group for name in _labels(pair))

        def lack(part: str, labels: Counter[str] = labels) -> float:
            share = parts[part] / total
            return sum(
                count * (share - have[part][label] / in_all[label]) / share for label, count in labels.items()
            ) / sum(labels.values())

        part = max(parts, key=lack)
        have[part].update(labels)
        chosen[part].update(pair.id for pair in group)
    if empty := [name for name in parts if not chosen[name]]:
        raise InputError(
            f"part {empty[0]} stays empty: {len(pairs)} pairs are {len(groups)} groups of near prompts; give it a "
            "larger share, or a higher --near"
        )
    return {name: [pair for pair in pairs if pair.id in chosen[name]] for name in parts}


def split_dataset(
    dataset: PreferenceDataset, folder: Path, parts: Mapping[str, float], *, near: float = NEAR, seed: int = 0
) -> dict[str, int]:
    """Write every part as a dataset `folder/<part>` of its own; return how many pairs each has.

    Raises:
        InputError: a part stays empty, the folder is not empty, or an image is missing.
        SafetyExpertsError: it cannot be written.
    """
    found = split_pairs(dataset.pairs, parts, near=near, seed=seed)
    with whole_folder(folder) as temporary:
        for name, pairs in found.items():
            write_dataset(temporary / name, dataset.info, ((pair, dataset.image_paths(pair)) for pair in pairs))
    return {name: len(pairs) for name, pairs in found.items()}


def _text(pair: PreferencePair) -> str:
    return " ".join(sorted(words_of(pair.prompt)))


def _labels(pair: PreferencePair) -> tuple[str, ...]:
    return (*pair.categories, "")  # "" counts every pair, so that the sizes of the parts come right too


def _order(group: list[PreferencePair], seed: int) -> str:
    return hashlib.sha256(f"{seed} {min(_text(pair) for pair in group)}".encode()).hexdigest()


def parse_parts(text: str) -> dict[str, float]:
    """Read `train=0.8,held-out=0.2`.

    Raises:
        InputError: fewer than two parts, a name that is no folder name, or a share that is not above 0.
    """
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, separator, share = (piece.strip() for piece in item.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not separator or not 0 < value < float("inf"):
            raise InputError("parts: write name=share, …, with shares above 0: train=0.8,held-out=0.2")
        if not name.replace("-", "").replace("_", "").isalnum() or name in parts or len(name) > 60:
            raise InputError("parts: a name is of letters, digits, - and _, and stands once")
        parts[name] = value
    if len(parts) < 2:
        raise InputError("parts: name at least two, such as train=0.8,held-out=0.2")
    return parts
