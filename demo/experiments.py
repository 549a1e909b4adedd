"""Experiments on the toy world: many experts trained and measured, on all cores, going on where a stopped run ended."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..experts.expert import Expert
from ..experts.expert_file import load_expert
from ..files import write_atomically
from ..preferences.dataset import PreferenceDataset
from ..training.recipe import Recipe, load_recipe
from ..training.trainer import train_expert
from .toy_sampling import ToySampler

PAIRS_PER_CATEGORY = 48


@cache
def sampler() -> ToySampler:
    """Return this process's toy model."""
    return ToySampler()


def toy_dataset(work: Path) -> PreferenceDataset:
    """Return 48 pairs of each category, drawn by the toy model into `work` if they are not there yet."""
    return sampler().build_dataset(work / "pairs", PAIRS_PER_CATEGORY)


def trained(work: Path, name: str, recipe: Recipe, category: str | None) -> Expert:
    """Return the expert `work`/<name>.safetensors, trained now unless it is there with this very recipe."""
    path = work / f"{name}.safetensors"
    if path.exists() and (expert := load_expert(path)).info.get("recipe") == recipe.model_dump():
        return expert
    dataset = PreferenceDataset.open(work / "pairs")
    model = sampler()
    return train_expert(
        model.checkpoint_path,
        dataset,
        recipe,
        path,
        category=category,
        device="cpu",
        tokenizer_folder=model.tokenizer_folder,
    ).expert


def category_expert(work: Path, category: str, seed: int, overrides: Sequence[str] = ()) -> Expert:
    """Return the expert of one category and seed, by the toy recipe with these changes."""
    return trained(work, f"{category}-{seed}", load_recipe("toy", [*overrides, f"seed={seed}"]), category)


def remembered(path: Path, compute: Callable[[], Any]) -> Any:
    """Return the JSON in `path`, computed and written there the first time."""
    if not path.exists():
        value = compute()
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(value), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def in_parallel(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield function(job) for each job, in order, from processes of one thread each.

    One thread each: on a CPU two processes draw nearly twice as much as one of two threads.
    """
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when the processes start
    with context.Pool(workers) as pool:
        yield from pool.imap(function, jobs)
