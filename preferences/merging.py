"""One dataset of several."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .dataset import PreferenceDataset, PreferencePair
from .records import DatasetInfo
from .whole_folder import write_dataset


def merge_datasets(
    datasets: Sequence[PreferenceDataset], folder: Path, *, mixed: bool = False
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Write all pairs of several datasets as one; return them and counts of what was said twice.

    A pair that stands in several (by id) is taken once, from the first, with the scores of all of them; its categories
    are put together, a flag that differs becomes unknown, and so does a review that differs.

    Args:
        mixed: take datasets of other base checkpoints or sampler settings together; the result names none then.

    Raises:
        InputError: they were drawn by another model or other settings, or the folder is not empty.
        SafetyExpertsError: it cannot be written.
    """
    first = datasets[0]
    info = first.info
    for other in datasets[1:]:
        if difference := other.info.difference(info):
            if not mixed:
                raise InputError(
                    f"{other.folder} and {first.folder} were not made alike ({difference}); name datasets of one model "
                    "and setting, or take them together with --mixed"
                )
            info = DatasetInfo({}, {})  # type: ignore[arg-type]
    notes = [list(dict.fromkeys(getattr(dataset.info, name) for dataset in datasets)) for name in _NOTES]
    prompt_source, licence_note = ("; ".join(filter(None, texts)) for texts in notes)
    info = dataclasses.replace(info, prompt_source=prompt_source, licence_note=licence_note)
    counts: Counter[str] = Counter()
    merged: dict[str, tuple[PreferencePair, tuple[Path, Path]]] = {}
    for dataset in datasets:
        for pair in dataset.pairs:
            if pair.id in merged:
                counts["pairs in several datasets"] += 1
                known, paths = merged[pair.id]
                merged[pair.id] = _together(known, pair, counts), paths
            else:
                named = dataclasses.replace(
                    pair,
                    chosen_file_name=f"images/{pair.id}-chosen.png",
                    rejected_file_name=f"images/{pair.id}-rejected.png",
                )
                merged[pair.id] = named, dataset.image_paths(pair)
    return write_dataset(folder, info, merged.values()), dict(counts)


_NOTES = ("prompt_source", "licence_note")


def _together(first: PreferencePair, second: PreferencePair, counts: Counter[str]) -> PreferencePair:
    changes: dict = {
        "scores": second.scores | first.scores,
        "categories": (*first.categories, *second.categories),
        "concept": first.concept or second.concept,
    }
    for name in ("chosen_unsafe", "rejected_unsafe"):
        flags = {getattr(pair, name) for pair in (first, second)} - {None}
        changes[name] = flags.pop() if len(flags) == 1 else None
    reviews = {first.review, second.review} - {None}
    if len(reviews) > 1:
        counts["reviews that differ, to be made again"] += 1
    changes["review"] = reviews.pop() if len(reviews) == 1 else None
    return dataclasses.replace(first, **changes)
