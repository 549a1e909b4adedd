"""The pack's own socket types, and the inputs and readings several nodes share."""

from comfy_api.latest import io

from ..preferences.categories import CATEGORIES, canonical_categories, canonical_category
from ..preferences.pairs import PromptPair
from . import host

PromptPairs = io.Custom("PROMPT_PAIRS")
Dataset = io.Custom("PREFERENCE_DATASET")
Expert = io.Custom("EXPERT")
Recipe = io.Custom("TRAINING_RECIPE")
ConceptGate = io.Custom("CONCEPT_GATE")

ALL_CATEGORIES = "all"


class PromptPairList(list[PromptPair]):
    """What travels on a PROMPT_PAIRS link; ComfyUI prints inputs in error reports, so its repr shows no prompt."""

    def __repr__(self) -> str:
        return f"<{len(self)} prompt pairs>"


def category_inputs(*, with_all: bool = False) -> list[io.Input]:
    """Return the two widgets that name a safety category; read them with `one_category` or `several_categories`."""
    names = [ALL_CATEGORIES, *CATEGORIES] if with_all else list(CATEGORIES)
    return [
        io.Combo.Input("category", options=names, default=names[0], tooltip="The safety category."),
        io.String.Input(
            "own_category",
            default="",
            optional=True,
            advanced=True,
            tooltip="A category of your own"
            + ("" if with_all else ", or several with commas between")
            + "; when filled it replaces the one above.",
        ),
    ]


# ComfyUI hands over None for an optional widget inside a dynamic combo that the request leaves out.
def one_category(category: str, own_category: str | None) -> str | None:
    """Return the canonical category, or None for all of them."""
    name = (own_category or "").strip() or category
    return None if name == ALL_CATEGORIES else canonical_category(name)


def several_categories(category: str, own_category: str | None) -> tuple[str, ...]:
    """Return the canonical categories."""
    return canonical_categories((own_category or "").strip() or category)


def dataset_name_input() -> io.Input:
    return io.String.Input(
        "dataset_name",
        default="my_dataset",
        tooltip="Folder in ComfyUI's datasets folder. An existing dataset is continued: pairs it has are kept.",
    )


def checkpoint_input(*extra: str, tooltip: str) -> io.Input:
    """Return the combo of ComfyUI's checkpoints, after entries that are no file."""
    return io.Combo.Input("checkpoint", options=[*extra, *host.checkpoint_names()], tooltip=tooltip)
