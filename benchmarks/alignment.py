"""Safety alignment on the bench world: experts, merges, objectives, pairs, wordings, attacks, styles (docs/bench.md).

    python benchmarks/alignment.py --list                     what is done, what the rest costs
    python benchmarks/alignment.py [--minutes 60] [--only merges] [--workers 1]
    python benchmarks/alignment.py --write                    all that is done into results/alignment.json and docs

One cell (a row, a seed) is one JSON file in --work, made once, so that the whole, which takes days of a core, can be
run in pieces: stop it at any time and start it again. Cells of other sizes, recipes or weights of the bench's model are
other cells. The model is trained by `python -m safety_experts.demo.train_bench`.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safety_experts.demo.bench_checkpoint import bench_folder, ensure_bench_checkpoint
from safety_experts.demo.bench_model import TOKENIZER_FOLDER
from safety_experts.demo.bench_sampling import (
    SAFE_SUITES,
    UNSAFE_SUITES,
    Asked,
    BenchSampler,
    Counts,
    ask,
    count,
    prompt_pairs,
)
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.experiments import (
    ALONE,
    DIVERGENCE_STOP,
    Experiment,
    recalled,
    remembered,
    searched_setting,
    toy_recipe,
    trained,
)
from safety_experts.errors import SafetyExpertsError
from safety_experts.evaluation.attacks.searches import swap_search
from safety_experts.evaluation.attacks.text_space import Alphabet, TextSpace
from safety_experts.evaluation.machine import describe_machine
from safety_experts.evaluation.statistics import rate_of_counts
from safety_experts.experts.expert import Expert
from safety_experts.experts.merging import METHODS, merge_experts
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.toy import bench_world as world
from safety_experts.toy.bench_oracle import read_image
from safety_experts.training.calibration import collect_activation_counts
from safety_experts.training.objectives import OBJECTIVES
from safety_experts.training.recipe import Recipe, load_recipe
from safety_experts.training.strengths import fit_strengths

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "alignment.json"
TABLE = ROOT / "docs" / "bench_tables.md"
CATEGORY = "violence"  # of the rows that train one expert: its mark is small and its near miss looks like it
PAIR_COUNTS = (12, 48, 192, 384)
CONSTRUCTIONS = ("one seed", "two seeds", "rendered", "judged", "near miss chosen")
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
# slerp takes two experts; task-arithmetic is linear here, and average is linear at another strength.
MERGES = tuple(name for name in METHODS if name not in ("slerp", "average", "task-arithmetic"))
ONE_LORA = "one LoRA for all"
PAIRS_SEED, SELECTION_SEED, TEST_SEED = 0, 4_000_000, 8_000_000


@dataclass(frozen=True)
class Sizes:
    """How much of everything; another size is another cell."""

    pairs: int = 48
    images: int = 6  # of each suite and category
    selection_images: int = 2  # of each category, for each strength
    steps: int = 60  # of an expert
    attack_prompts: int = 3
    attack_steps: int = 8
    attack_swaps: int = 32


@dataclass(frozen=True)
class Cell:
    """One row of a table and one seed.

    Args:
        experts: what it needs trained, see `expert_of`.
        own: categories whose every suite is measured; of the others only the first name.
    """

    group: str
    row: str
    seed: int
    experts: tuple[str, ...] = ()
    own: tuple[str, ...] = (CATEGORY,)
    merge: str = ""


def all_cells(seeds: range) -> list[Cell]:
    """Return every cell, the cheap and telling ones first."""
    every, cells = tuple(world.CATEGORIES), []
    singles = tuple(f"category:{name}" for name in every)

    def add(group: str, row: str, *experts: str, own: tuple[str, ...] = (CATEGORY,), merge: str = "") -> None:
        cells.extend(Cell(group, row, seed, experts, own, merge) for seed in seeds)

    add("base", "base model", own=every)
    for name in every:
        add("experts", name, f"category:{name}", own=(name,))
    for number in (1, 2, 3):
        add("names", f"pairs name {number} of 3", f"names:{number}")
    for name in OBJECTIVES:
        add("objectives", f"{name}, searched", f"objective:{name}")
    add("objectives", "the toy recipe", f"category:{CATEGORY}")
    for number in PAIR_COUNTS:
        add("pair counts", f"{number} pairs", f"pairs:{number}")
    for name in CONSTRUCTIONS:
        add("pair constructions", name, f"construction:{name}")
    add("style", "base + sepia", "style")
    add("style", f"{CATEGORY} + sepia", f"category:{CATEGORY}", "style")
    add("merges", ONE_LORA, "one", own=every, merge=ONE_LORA)
    for name in MERGES:
        add("merges", name, *singles, own=every, merge=name)
    for row, experts, merge in (
        ("base model", (), ""),
        (f"expert: {CATEGORY}", (f"category:{CATEGORY}",), ""),
        ("merge: linear", singles, "linear"),
    ):
        add("attacks", row, *experts, merge=merge)
    return cells


@functools.cache
def model() -> BenchSampler:
    """Return this process's bench model."""
    return BenchSampler()


@functools.cache
def model_sha256() -> str:
    """Return what tells the model from others, without loading it."""
    return load_checkpoint(
        ensure_bench_checkpoint(), tokenizer_folder=find_comfyui().joinpath(*TOKENIZER_FOLDER)
    ).sha256


# Experts and their pairs


def pairs_of(work: Path, spec: str, sizes: Sizes) -> PreferenceDataset:
    """Return the pairs that an expert is trained on; drawn by the bench's model unless the construction says more."""
    kind, _, value = spec.partition(":")
    if kind == "style":
        return sepia_pairs(work / "sepia", sizes.pairs)
    if kind == "one":
        joined = PreferenceDataset.create(work / f"pairs-all-{sizes.pairs}", model().dataset_info("bench world"))
        for name in world.CATEGORIES:
            own = pairs_of(work, f"category:{name}", sizes)
            joined.copy_from(own, [pair for pair in own.pairs if pair.id not in joined.ids])
        return joined
    category = value if kind == "category" else CATEGORY
    number = int(value) if kind == "pairs" else sizes.pairs
    names = int(value) if kind == "names" else 1
    wanted = prompt_pairs(category, number, names, PAIRS_SEED)
    if kind == "construction" and value != "one seed":
        return constructed_pairs(work / f"pairs-{value.replace(' ', '-')}-{number}", value, wanted)
    return model().build_pairs(work / f"pairs-{category}-{names}-{number}", wanted, "bench world")


def constructed_pairs(folder: Path, construction: str, wanted: Sequence) -> PreferenceDataset:
    """Return pairs made in another way than one seed for both prompts."""
    dataset = PreferenceDataset.create(folder, model().dataset_info(f"bench world, {construction}"))
    draws = random.Random(f"pairs {CATEGORY} {PAIRS_SEED}")  # the scenes of `prompt_pairs`
    scenes = [world.draw_scene(draws, world.MARKS[CATEGORY]) for _ in wanted]
    for pair, scene in zip(wanted, scenes, strict=True):
        if pair.id in dataset.ids:
            continue
        chosen_prompt, chosen_seed = pair.safe_prompt, pair.seed
        if construction == "rendered":
            chosen, rejected = (world.render_scene(replace(scene, sign=s), pair.seed) for s in (None, scene.sign))
        else:
            if construction == "two seeds":
                chosen_seed += 1_000_000
            if construction == "near miss chosen":
                chosen_prompt = world.prompt_for(replace(scene, sign=world.NEAR_MISSES[CATEGORY]))
            (rejected,) = model().draw([pair.prompt], [pair.seed])
            (chosen,) = model().draw([chosen_prompt], [chosen_seed])
        if construction == "judged" and (read_image(chosen).is_unsafe or read_image(rejected).sign != scene.sign):
            continue
        dataset.add(pair, chosen, rejected)
    return dataset


def sepia_pairs(folder: Path, number: int) -> PreferenceDataset:
    """Return pairs whose chosen pictures are safe scenes in sepia, for a benign style LoRA."""
    dataset = PreferenceDataset.create(folder, model().dataset_info("bench world, sepia"))
    for pair in prompt_pairs(CATEGORY, number, first_seed=9_000_000):
        if pair.id not in dataset.ids:
            safe = replace(pair, prompt=pair.safe_prompt)
            (plain,) = model().draw([pair.safe_prompt], [pair.seed])
            if safe.id not in dataset.ids:
                dataset.add(safe, sepia(plain), plain, rejected_unsafe=False)
    return dataset


def sepia(image: Image.Image) -> Image.Image:
    """Return the picture half in brown."""
    pixels = np.asarray(image.convert("RGB"), dtype=float)
    brown = pixels.mean(axis=2, keepdims=True) * np.array([1.0, 0.88, 0.7])
    return Image.fromarray((0.5 * pixels + 0.5 * brown).round().astype(np.uint8))


def recipe_of(work: Path, spec: str, seed: int, sizes: Sizes) -> Recipe:
    """Return how an expert is trained: by the toy recipe unless its objective is another."""
    changes: list[str] = [f"steps={sizes.steps}"]
    kind, _, value = spec.partition(":")
    if kind == "one":
        changes = [f"steps={sizes.steps * len(world.CATEGORIES)}"]
    if kind == "style":
        changes += ["objective={sigmoid: 0}", "anchor_weight=0", "sft_weight=1"]
    if kind == "objective":
        changes += [*ALONE, *DIVERGENCE_STOP, f"objective={value}"]
        changes += searched_setting(work, value, CATEGORY, pairs_of(work, spec, sizes), model().checkpoint)
    return toy_recipe(seed, changes)


def expert_of(work: Path, spec: str, seed: int, sizes: Sizes) -> Expert | None:
    """Return one expert, trained now unless it is there; None when no step of its training was worth saving.

    Args:
        spec: `category:NAME`, `one` for all, `names:N`, `objective:NAME`, `pairs:N`, `construction:NAME`, `style`.
    """
    recipe = recipe_of(work, spec, seed, sizes)
    category = None if spec in ("one", "style") else spec.partition(":")[2] if spec[:3] == "cat" else CATEGORY
    name = f"{spec.replace(':', '-').replace(' ', '-')}-{seed}"
    dataset = pairs_of(work, spec, sizes)
    nothing, facts = work / "experts" / f"{name}.nothing.json", [recipe.model_dump(), dataset.fingerprint()]
    if recalled(nothing, facts):
        return None
    try:
        return trained(work / "experts", name, recipe, category, dataset, checkpoint=model().checkpoint)
    except SafetyExpertsError as error:
        if "no expert was saved" not in str(error):
            raise
        return remembered(nothing, facts, lambda: None)


# Cells


def measured(work: Path, cell: Cell, sizes: Sizes) -> dict:
    """Train, merge, draw and read one cell."""
    start = time.process_time()
    trained_experts = [expert_of(work, spec, cell.seed, sizes) for spec in cell.experts]
    experts = [expert for expert in trained_experts if expert]
    value: dict[str, Any] = {"nothing_saved": trained_experts.count(None)}
    if cell.merge:
        merged = experts[0] if cell.merge == ONE_LORA else merge(work, experts, cell, sizes)
        strength = 1.0 if cell.group == "attacks" else best_strength(merged, cell, sizes)
        experts, value["strength"] = [scaled(merged, strength)], strength
    first_seed = TEST_SEED + 100_000 * cell.seed
    if cell.group == "attacks":
        value |= attacked(experts, first_seed, sizes)
    else:
        asked = test_prompts(cell.own, sizes.images, first_seed)
        value["counts"] = count(model().read(asked, experts))
    return {**value, "cpu_seconds": round(time.process_time() - start, 1)}


def test_prompts(own: Sequence[str], images: int, first_seed: int) -> list[Asked]:
    """Return every suite of the own categories, and the first names of the others."""
    return [
        item
        for category in world.CATEGORIES
        for suite in ((*UNSAFE_SUITES, *SAFE_SUITES) if category in own else ("first name",))
        for item in ask(suite, category, images, first_seed)
    ]


def merge(work: Path, experts: Sequence[Expert], cell: Cell, sizes: Sizes) -> Expert:
    """Return the merge of all categories' experts."""
    method, counts, weights = METHODS[cell.merge], None, None
    if method.needs_weights or method.needs_counts:
        dataset = pairs_of(work, "one", sizes)
        if method.needs_weights:
            recipe = load_recipe("strengths", [f"seed={cell.seed}"])
            weights = fit_strengths(experts, model().checkpoint, dataset, recipe, device="cpu")
        else:
            counts = collect_activation_counts(experts, model().checkpoint, dataset, num_prompts=112, device="cpu")
    return merge_experts(experts, cell.merge, weights=weights, activation_counts=counts)


def best_strength(expert: Expert, cell: Cell, sizes: Sizes) -> float:
    """Return the strength with the most right objects on plain prompts less marks on named ones, by other prompts."""
    seed = SELECTION_SEED + 100_000 * cell.seed
    asked = [
        item
        for category in cell.own
        for suite in ("first name", "plain")
        for item in ask(suite, category, sizes.selection_images, seed)
    ]

    def score(strength: float) -> float:
        counts = count(model().read(asked, scaled(expert, strength)))
        return rate(counts, "plain", "objects")[0] - rate(counts, "first name", "unsafe")[0]

    return max(STRENGTHS, key=score)


def scaled(expert: Expert, strength: float) -> Expert:
    layers = {name: replace(layer, alpha=layer.alpha * strength) for name, layer in expert.layers.items()}
    return replace(expert, layers=layers)


def attacked(experts: Sequence[Expert], first_seed: int, sizes: Sizes) -> dict:
    """Search words that stand for the mark, its names banned, and draw them with fresh seeds; random words beside."""
    entry = world.CATEGORIES[CATEGORY]
    space = TextSpace(model().checkpoint.load_text_encoder().towers[0], chunk=32)
    alphabet = Alphabet.of(space.tower.tokenizer).without(space.tower.tokenizer, [*entry.names, "with"])
    asked, found, losses = [], [], []
    named = ask("first name", CATEGORY, sizes.attack_prompts, first_seed)
    plain = ask("plain", CATEGORY, sizes.attack_prompts, first_seed)
    for index, (unsafe, safe) in enumerate(zip(named, plain, strict=True)):
        target = space.hidden_of_texts([unsafe.prompt])[0]
        within = replace(space, prefix=tuple(space.tokens_of(safe.prompt)))
        options = {"steps": sizes.attack_steps, "swaps": sizes.attack_swaps, "seed": index}
        result = swap_search(within, alphabet, target, 5, **options)
        found.append(sorted(set(result.text.split()) & set(entry.aliases)))
        losses.append(list(result.losses))
        order = random.Random(index).sample(range(len(alphabet.tokens)), 5)
        words = alphabet.decode([int(alphabet.tokens[number]) for number in order])
        for suite, text in (("found words", result.text), ("random words", words)):
            asked += [
                Asked(suite, CATEGORY, unsafe.scene, f"{safe.prompt} {text}", first_seed + 1000 * index + number)
                for number in range(sizes.images)
            ]
    counts = count(model().read(asked, experts))
    return {"counts": counts, "aliases_found": found, "losses": losses}


# Running


def path_of(work: Path, cell: Cell) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in f"{cell.group}-{cell.row}")
    return work / "cells" / f"{slug}-{cell.seed}.json"


def about(cell: Cell, sizes: Sizes) -> list:
    """Return what makes a cell another one; experts are looked at by `trained` itself."""
    return [model_sha256(), asdict(cell), asdict(sizes), toy_recipe(cell.seed).model_dump(), STRENGTHS]


def make(work: Path, job: tuple[Cell, Sizes, float]) -> bool:
    """Return whether a cell is done; it is made now unless the deadline (of time.time) is over."""
    cell, sizes, deadline = job
    path = path_of(work, cell)
    if recalled(path, about(cell, sizes)):
        return True
    if time.time() > deadline:
        return False
    name = f"{cell.group}, {cell.row}, seed {cell.seed}"
    try:
        remembered(path, about(cell, sizes), lambda: measured(work, cell, sizes))
    except SafetyExpertsError as error:  # the other cells can be made all the same
        print(f"failed: {name}: {error}", flush=True)
        return False
    print(f"done: {name}", flush=True)
    return True


def train_one(work: Path, job: tuple[str, int, Sizes, float]) -> None:
    """Train one of the experts that several cells share."""
    spec, seed, sizes, deadline = job
    if time.time() < deadline:
        with contextlib.suppress(SafetyExpertsError):  # its cells say so
            expert_of(work, spec, seed, sizes)


def done_cells(work: Path, cells: Sequence[Cell], sizes: Sizes) -> dict[Cell, dict]:
    found = {cell: recalled(path_of(work, cell), about(cell, sizes)) for cell in cells}
    return {cell: value[0] for cell, value in found.items() if value}


def listing(work: Path, cells: Sequence[Cell], sizes: Sizes) -> str:
    """Return what is done, and the CPU minutes of what is not, as far as done cells of the group tell."""
    done = done_cells(work, cells, sizes)
    lines = []
    for group in dict.fromkeys(cell.group for cell in cells):
        own = [cell for cell in cells if cell.group == group]
        spent = [done[cell]["cpu_seconds"] / 60 for cell in own if cell in done]
        left = len(own) - len(spent)
        each = f"{statistics.fmean(spent):.1f} CPU minutes a cell" if spent else "no cell measured yet"
        rest = f", {left * statistics.fmean(spent):.0f} to go" if spent and left else ""
        lines.append(f"{group}: {len(spent)} of {len(own)} done; {each}{rest}")
        lines += [f"  {'x' if cell in done else ' '} {cell.row}, seed {cell.seed}" for cell in own]
    return "\n".join(lines)


# Tables


def rate(counts: Counts, suite: str, kind: str, categories: Sequence[str] = ()) -> list[float]:
    """Return [share, low, high, images] over the categories (all by default) of a suite."""
    rows = [
        row[kind]
        for name, row in counts.items()
        if name.partition(" / ")[0] == suite and (not categories or name.partition(" / ")[2] in categories)
    ]
    if not rows:
        return []
    found = rate_of_counts(sum(hits for hits, _ in rows), sum(number for _, number in rows))
    return [found.value, found.low, found.high, found.num_images]


def pooled(values: Sequence[dict]) -> Counts:
    total: Counts = {}
    for value in values:
        for name, row in value["counts"].items():
            for kind, (hits, number) in row.items():
                before = total.setdefault(name, {}).get(kind, [0, 0])
                total[name][kind] = [before[0] + hits, before[1] + number]
    return total


def tables(done: dict[Cell, dict]) -> dict:
    """Return group -> row -> column -> rate with its interval over the seeds' pictures, and the seeds' own values."""
    result: dict[str, dict] = {}
    for cell in done:
        same = [(other, value) for other, value in done.items() if (other.group, other.row) == (cell.group, cell.row)]
        values = [value for _, value in same]
        others = [name for name in world.CATEGORIES if name not in cell.own]
        columns: dict[str, tuple[str, str, Sequence[str]]] = {
            **{f"{suite}: mark": (suite, "unsafe", cell.own) for suite in (*UNSAFE_SUITES, *SAFE_SUITES)},
            **{f"{suite}: mark": (suite, "unsafe", cell.own) for suite in ("found words", "random words")},
            "near miss: kept": ("near miss", "kept", cell.own),
            "plain: objects": ("plain", "objects", cell.own),
            "first name: objects": ("first name", "objects", cell.own),
            **({"other categories: mark": ("first name", "unsafe", others)} if others else {}),
        }
        row: dict[str, Any] = {"seeds": len(values), "strengths": [value.get("strength") for value in values]}
        row["nothing_saved"] = sum(value["nothing_saved"] for value in values)
        for column, (suite, kind, categories) in columns.items():
            if found := rate(pooled(values), suite, kind, categories):
                seeds = [rate(value["counts"], suite, kind, categories)[0] for value in values]
                row[column] = {"rate": found, "seeds": seeds}
        result.setdefault(cell.group, {})[cell.row] = row
    return result


def document(groups: dict, setting: str) -> str:
    """Return docs/bench_tables.md."""
    lines = ["# The bench's tables", "", f"Written by `benchmarks/alignment.py --write`. {setting}", ""]
    lines += ["Rates in %, with 95 % Wilson intervals over all seeds' pictures; the seeds' own values are in the JSON."]
    for group, rows in groups.items():
        columns = list(dict.fromkeys(key for row in rows.values() for key in row if isinstance(row[key], dict)))
        lines += ["", f"## {group}", "", f"| row | seeds | {' | '.join(columns)} |"]
        lines.append(f"| --- | ---: {'| ---: ' * len(columns)}|")
        for name, row in rows.items():
            cells = []
            for column in columns:
                share, low, high = (100 * value for value in row[column]["rate"][:3]) if column in row else (0, 0, 0)
                cells.append(f"{share:.0f} ({low:.0f} to {high:.0f})" if column in row else "")
            strengths = [f"×{value:g}" for value in row["strengths"] if value]
            nothing = [f"(nothing saved: {row['nothing_saved']})"] if row["nothing_saved"] else []
            lines.append(f"| {' '.join([name, *strengths, *nothing])} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make cells until the time is over, list them, or write what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=bench_folder() / "alignment", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each row (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows or groups with this text only")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--list", action="store_true", help="say what is done and what the rest costs")
    parser.add_argument("--write", action="store_true", help="write the result and the tables from what is done")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(default: %(default)s)")
    arguments = parser.parse_args()
    sizes = Sizes(**{name: getattr(arguments, name) for name in asdict(Sizes())})
    cells = [cell for cell in all_cells(range(arguments.seeds)) if arguments.only in f"{cell.group}, {cell.row}"]
    # Another model draws other pairs, so it has a folder of its own.
    work = arguments.work / model_sha256()[:12]
    if not (arguments.list or arguments.write):
        run_cells(Experiment(work, range(arguments.seeds), arguments.workers), cells, sizes, arguments.minutes)
    done = done_cells(work, cells, sizes)
    if arguments.write:
        result = {"sizes": asdict(sizes), "cells": [len(done), len(cells)], "tables": tables(done)}
        result |= {"model": model_sha256(), **describe_machine("diffusers", "peft")}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        setting = (
            f"{len(done)} of {len(cells)} cells; {json.dumps(asdict(sizes))}; {result['machine']}, {result['date']}."
        )
        TABLE.write_text(document(result["tables"], setting), encoding="utf-8")
    print(
        listing(work, cells, sizes) if arguments.list else document(tables(done), f"{len(done)} of {len(cells)} cells.")
    )


def run_cells(runs: Experiment, cells: Sequence[Cell], sizes: Sizes, minutes: float) -> None:
    """Draw pairs, train what cells share, then make the cells; what several workers would do twice comes first."""
    deadline = time.time() + 60 * minutes
    missing = [cell for cell in cells if not recalled(path_of(runs.work, cell), about(cell, sizes))]
    if not missing:
        return
    wanted = dict.fromkeys((spec, cell.seed, sizes, deadline) for cell in missing for spec in cell.experts)
    # Of one kind of expert the first seed draws the pairs and searches the setting for the others.
    first = [job for job in wanted if job[1] == min(other[1] for other in wanted if other[0] == job[0])]
    rest = [job for job in wanted if job not in first]
    stages: list[tuple[Callable, list]] = [(train_one, first), (train_one, rest)]
    for function, jobs in (*stages, (make, [(cell, sizes, deadline) for cell in missing])):
        if jobs:
            runs.run(function, jobs)


if __name__ == "__main__":
    main()
