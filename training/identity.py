"""Which training an expert or a state is of: the facts that decide its result, and whether it is done already."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..experts.expert import Expert
from ..experts.expert_file import load_expert
from ..experts.info import ExpertInfo, Trained
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset
from .recipe import Recipe
from .retained import RetainedPrompts


def describe_training(
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    category: str | None,
    with_experts: Sequence[Expert] = (),
    retain: RetainedPrompts | None = None,
) -> ExpertInfo:
    """Return what an expert's metadata say of its training before the first step.

    Args:
        retain: prompts of the user's to retain; only their hash is written.
    """
    pairs = dataset.training_pairs(category, recipe.pairs)
    trained = Trained(
        recipe=recipe.model_dump(mode="json"),
        dataset_fingerprint=dataset.fingerprint(),
        encoding_id=checkpoint.encoding_id,
        num_pairs=len(pairs),
        seed=recipe.seed,
        trained_with=tuple(expert.as_parent() for expert in with_experts),
        retained_sha256=hashlib.sha256(repr(sorted(retain.items())).encode()).hexdigest() if retain else None,
    )
    categories = [category] if category else sorted({name for pair in pairs for name in pair.categories})
    return ExpertInfo(categories=tuple(categories), base_checkpoint=checkpoint.id, origin=trained)


def identity_of(info: ExpertInfo) -> dict:
    """Return what has to be the same for two trainings to be one, as JSON values.

    Names of files say nothing, neither a model's nor a recipe's.
    """
    trained, base = info.trained, info.base_checkpoint
    assert trained
    parts = {"base_files": base.files, "base_patches": list(base.patches)} if base.files or base.patches else {}
    return {
        "recipe": {key: value for key, value in trained.recipe.items() if key != "name"},
        "dataset_fingerprint": trained.dataset_fingerprint,
        "base_checkpoint": base.sha256,
        **parts,
        "encoding_id": trained.encoding_id,
        **({"retained": trained.retained_sha256} if trained.retained_sha256 else {}),
        "categories": list(info.categories),
        "trained_with": [parent.tensors_sha256 for parent in trained.trained_with],
    }


def finished_training(
    path: str | Path,
    recipe: Recipe,
    dataset: PreferenceDataset,
    checkpoint: Checkpoint,
    category: str | None = None,
    with_experts: Sequence[Expert] = (),
    retain: RetainedPrompts | None = None,
) -> Expert | None:
    """Return the expert in `path` if it is this very training's and finished, else None.

    One that was resumed with other options is not; nor is one that an older version of a recipe made.
    """
    if not Path(path).is_file():
        return None
    try:
        expert = load_expert(path)
    except InputError:  # damaged: it is trained again
        return None
    trained = expert.info.trained
    if trained is None or not trained.finished or trained.resumed_with:
        return None
    wanted = describe_training(checkpoint, dataset, recipe, category, with_experts, retain)
    return expert if identity_of(expert.info) == identity_of(wanted) else None
