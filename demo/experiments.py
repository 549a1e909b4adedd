"""Experiments on the toy world: many experts trained and measured, on all cores, going on where a stopped run ended."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..experts.expert import Expert
from ..files import write_atomically
from ..preferences.dataset import PreferenceDataset
from ..toy.world import MARKS
from ..training.identity import finished_training
from ..training.recipe import Recipe, load_recipe
from ..training.trainer import train_expert
from .toy_sampling import ToySampler

PAIRS_PER_CATEGORY = 48


@functools.cache
def sampler() -> ToySampler:
    """Return this process's toy model."""
    return ToySampler()


@dataclass(frozen=True)
class Experiment:
    """Where an experiment keeps its dataset, experts and readings, and how much of it is wanted."""

    work: Path
    seeds: range
    workers: int
    only: str = ""

    def run(self, function: Callable[[Path, Any], Any], jobs: Sequence[Any]) -> dict[Any, Any]:
        """Return job -> function(work, job), from processes of one thread each.

        One thread each: on a CPU two processes draw nearly twice as much as one of two threads.
        """
        context = multiprocessing.get_context("spawn")
        with context.Pool(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(jobs, pool.imap(functools.partial(function, self.work), jobs), strict=True))


@contextlib.contextmanager
def experiment(description: str | None, categories: Sequence[str] = tuple(MARKS)) -> Iterator[Experiment]:
    """Read --work, --seeds, --workers and --only, and yield the experiment with 48 pairs a category in work/pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for dataset, experts and readings (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=3, help="of each expert (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure what has this text in its name only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        sampler().build_dataset(work / "pairs", PAIRS_PER_CATEGORY, categories)
        yield Experiment(work, range(arguments.seeds), arguments.workers, arguments.only)


def trained(
    work: Path,
    name: str,
    recipe: Recipe,
    category: str | None = None,
    dataset: PreferenceDataset | None = None,
    with_experts: Sequence[Expert] = (),
) -> Expert:
    """Return the expert `work`/<name>.safetensors, trained now unless it is there, made in this very way.

    Args:
        dataset: by default the one in work/pairs.
        with_experts: part of the model in training.
    """
    path = work / f"{name}.safetensors"
    dataset = dataset or PreferenceDataset.open(work / "pairs")
    checkpoint = sampler().checkpoint
    if made := finished_training(path, recipe, dataset, checkpoint, category, with_experts):
        return made
    return train_expert(
        checkpoint, dataset, recipe, path, category=category, device="cpu", with_experts=with_experts
    ).expert


def toy_recipe(seed: int, overrides: Sequence[str] = ()) -> Recipe:
    """Return the toy recipe with these changes and this seed."""
    return load_recipe("toy", [*overrides, f"seed={seed}"])


def remembered(path: Path, about: Any, compute: Callable[[], Any]) -> Any:
    """Return the JSON value in `path`; it is computed and written there unless one of the same `about` is there."""
    about = json.loads(json.dumps(about))
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["about"] == about:
            return kept["value"]
    value = compute()
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps({"about": about, "value": value}), encoding="utf-8")
    return value
