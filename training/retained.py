"""Prompts that must stay as they are beside the pairs' own safe ones: those of other categories, and the user's."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..files import read_text
from ..preferences.categories import canonical_category
from ..preferences.dataset import PreferenceDataset, PreferencePair
from ..preferences.pairs import read_prompt_pairs
from ..seeding import seeded_generator
from .recipe import Recipe

RetainedPrompts = Mapping[str, Sequence[str]]  # group (a category, a file's name) -> prompts
PROMPTS_PER_GROUP = 256


def read_retained(path: str | Path) -> RetainedPrompts:
    """Return the prompts of a file or a preference dataset, safe and unsafe ones, as one group under its name.

    Args:
        path: a dataset's folder; prompt pairs (.jsonl, .csv, .yaml); or .txt, one prompt a line.

    Raises:
        InputError: there is no such file, or it holds no prompts.
    """
    path = Path(path)
    pairs: Sequence = ()
    prompts: list[str] = []
    if path.is_dir():
        pairs = PreferenceDataset.open(path).pairs
    elif path.suffix.lower() == ".txt":
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        pairs = read_prompt_pairs(path)
    prompts += [text for pair in pairs for text in (pair.prompt, pair.safe_prompt)]
    if not prompts:
        raise InputError(f"{path}: holds no prompts to retain; give one a line, prompt pairs or a dataset")
    return {path.stem: tuple(dict.fromkeys(prompts))}


def groups_of_prompts(text: str) -> RetainedPrompts:
    """Return the prompts of a text, one a line; a blank line begins another group."""
    groups: dict[str, list[str]] = {}
    number = 1
    for line in text.splitlines():
        if line.strip():
            groups.setdefault(f"retain {number}", []).append(line.strip())
        elif groups:
            number = len(groups) + 1
    return {name: tuple(dict.fromkeys(prompts)) for name, prompts in groups.items()}


def text_of_groups(groups: RetainedPrompts) -> str:
    """Return the text that `groups_of_prompts` reads."""
    return "\n\n".join("\n".join(" ".join(prompt.split()) for prompt in prompts) for prompts in groups.values())


def retained_prompts(
    dataset: PreferenceDataset,
    pairs: Sequence[PreferencePair],
    category: str | None,
    recipe: Recipe,
    given: RetainedPrompts,
) -> RetainedPrompts:
    """Return what a training retains beside safe and empty prompts, at most 256 prompts a group, by the recipe's seed.

    Args:
        dataset: its pairs of other categories than `category` give one group each; without a category there are none.
        pairs: those that are trained on; their prompts cannot be retained.
        given: groups of the user's.

    Raises:
        InputError: prompts are given, but the recipe takes none, or all of a group's are trained on.
    """
    if not recipe.retain_fraction:
        if given:
            raise InputError("prompts to retain are given, but the recipe has retain_fraction 0: set it to 0.5")
        return {}
    trained = {pair.prompt for pair in pairs}
    groups = {**_other_categories(dataset, category), **given}
    return {name: _some(name, prompts, trained, recipe) for name, prompts in groups.items()}


def _other_categories(dataset: PreferenceDataset, category: str | None) -> dict[str, list[str]]:
    if category is None:
        return {}
    own, groups = canonical_category(category), dict[str, list[str]]()
    for pair in dataset.pairs:
        if own not in pair.categories and pair.review != "dropped":
            for name in pair.categories:
                groups.setdefault(name, []).append(pair.prompt)
    return dict(sorted(groups.items()))


def _some(name: str, prompts: Sequence[str], trained: Collection[str], recipe: Recipe) -> tuple[str, ...]:
    kept = [prompt for prompt in dict.fromkeys(prompts) if prompt not in trained]
    if not kept:
        raise InputError(f"every prompt of {name} is trained on, so none of them can be retained; leave it out")
    order = torch.randperm(len(kept), generator=seeded_generator(recipe.seed, "retained", name)).tolist()
    return tuple(kept[index] for index in order[:PROMPTS_PER_GROUP])
