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
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset
from ..toy.world import MARKS
from ..training.identity import finished_training
from ..training.recipe import Recipe, load_recipe
from ..training.trainer import train_expert
from .toy_sampling import ToySampler

PAIRS_PER_CATEGORY = 48
MAX_CHOSEN_INCREASE = 0.02
ALONE = ("anchor_weight=0", "sft_weight=0")
DIVERGENCE_STOP = ("held_out_fraction=0.2", "evaluate_steps=3", f"max_chosen_increase={MAX_CHOSEN_INCREASE}")
# What `searched_setting` tries.
BETAS = {"dspo": (0.001, 0.01, 0.1)}  # of this order as published, others around the toy recipe's
OTHER_BETAS, RATES = (200, 1000, 5000), (2e-3, 5e-4)
SHORT = ("held_out_fraction=0.2", "evaluate_steps=10", "steps=20", "schedule=constant")


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
    changes: tuple[str, ...] = ()

    def run(self, function: Callable[[Path, Any], Any], jobs: Sequence[Any]) -> dict[Any, Any]:
        """Return job -> function(work, job), from processes of one thread each.

        One thread each: on a CPU two processes draw nearly twice as much as one of two threads.
        """
        context = multiprocessing.get_context("spawn")
        with context.Pool(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return dict(zip(jobs, pool.imap(functools.partial(function, self.work), jobs), strict=True))


@contextlib.contextmanager
def experiment(description: str | None, categories: Sequence[str] = tuple(MARKS)) -> Iterator[Experiment]:
    """Read the options of every experiment, and yield it with 48 pairs a category in work/pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for dataset, experts and readings (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=3, help="of each expert (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure what has this text in its name only")
    parser.add_argument("--set", nargs="+", default=(), metavar="NAME=VALUE", help="changes of the toy recipe")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        sampler().build_dataset(work / "pairs", PAIRS_PER_CATEGORY, categories)
        yield Experiment(work, range(arguments.seeds), arguments.workers, arguments.only, tuple(arguments.set))


def trained(
    work: Path,
    name: str,
    recipe: Recipe,
    category: str | None = None,
    dataset: PreferenceDataset | None = None,
    with_experts: Sequence[Expert] = (),
    checkpoint: Checkpoint | None = None,
) -> Expert:
    """Return the expert `work`/<name>.safetensors, trained now unless it is there, made in this very way.

    Args:
        dataset: by default the one in work/pairs.
        with_experts: part of the model in training.
        checkpoint: by default the toy's.
    """
    path = work / f"{name}.safetensors"
    dataset = dataset or PreferenceDataset.open(work / "pairs")
    checkpoint = checkpoint or sampler().checkpoint
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
    if kept := recalled(path, about):
        return kept[0]
    value = compute()
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps({"about": about, "value": value}), encoding="utf-8")
    return value


def recalled(path: Path, about: Any) -> tuple[Any] | None:
    """Return the JSON value in `path`, alone in a tuple, or None unless there is one of the same `about`."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return (kept["value"],) if kept["about"] == json.loads(json.dumps(about)) else None


def searched_setting(
    work: Path, objective: str, category: str, dataset: PreferenceDataset, checkpoint: Checkpoint
) -> list[str]:
    """Return the beta, then the learning rate at that beta, that move held-out errors apart most (seed 0).

    By short trainings, scored by how far the errors of rejected and chosen held-out pairs move apart while the chosen
    images' error stays within `MAX_CHOSEN_INCREASE`: a number that means the same for every objective and every beta.
    """

    def separation(beta: float, rate: float) -> float:
        changes = (*ALONE, *SHORT, f"objective={objective}", f"beta={beta:g}", f"learning_rate={rate:g}")
        recipe = toy_recipe(0, changes)

        def compute() -> float:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "short.safetensors"
                result = train_expert(checkpoint, dataset, recipe, out, category=category, device="cpu")
            measured = [record for record in result.records if "eval/loss" in record]
            return max(
                2 * record["eval/rewards/margins"] / beta
                - 1000 * max(0.0, record["eval/chosen_increase"] - MAX_CHOSEN_INCREASE)
                for record in measured
            )

        return remembered(work / f"search-{objective}-{beta:g}-{rate:g}.json", recipe.model_dump(), compute)

    beta = max(BETAS.get(objective, OTHER_BETAS), key=lambda beta: separation(beta, RATES[0]))
    rate = max(RATES, key=lambda rate: separation(beta, rate))
    return [f"beta={beta:g}", f"learning_rate={rate:g}"]
