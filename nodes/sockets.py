"""The pack's own socket types, and the inputs and readings several nodes share."""

from comfy_api.latest import io

from ..errors import InputError
from ..preferences.categories import CATEGORIES, canonical_categories, canonical_category
from ..preferences.pairs import PromptPair
from . import host

PromptPairs = io.Custom("PROMPT_PAIRS")
Dataset = io.Custom("PREFERENCE_DATASET")
Expert = io.Custom("EXPERT")
Recipe = io.Custom("TRAINING_RECIPE")
ConceptGate = io.Custom("CONCEPT_GATE")
Judge = io.Custom("SAFETY_JUDGE")
Verifier = io.Custom("SAFETY_VERIFIER")

ALL_CATEGORIES, OWN_CATEGORY = "all", "own …"
OF_MODEL = "(the model says)"


class PromptPairList(list[PromptPair]):
    """What travels on a PROMPT_PAIRS link; ComfyUI prints inputs in error reports, so its repr shows no prompt."""

    def __repr__(self) -> str:
        return f"<{len(self)} prompt pairs>"


def category_inputs(*, with_all: bool = False) -> list[io.Input]:
    """Return the widget that names a safety category, and the hidden one that did so in workflows before.

    The list also takes a name that is not in it (web/widgets.js asks for one), so nodes with this input name
    `category` in `validate_inputs`: ComfyUI would refuse it otherwise. Read it with `one_category` or
    `several_categories`.
    """
    names = [ALL_CATEGORIES, *CATEGORIES] if with_all else list(CATEGORIES)
    several = "" if with_all else ", or several with commas between"
    return [
        io.Combo.Input(
            "category",
            options=[*names, OWN_CATEGORY],
            default=names[0],
            tooltip=f"The safety category; choose {OWN_CATEGORY!r} to name one of your own{several}.",
        ),
        io.String.Input(
            "own_category",
            default="",
            optional=True,
            advanced=True,
            tooltip="Of workflows made before categories of your own went into `category`; leave it empty.",
            extra_dict={"hidden": True},
        ),
    ]


# ComfyUI hands over None for an optional widget inside a dynamic combo that the request leaves out.
def one_category(category: str, own_category: str | None = None) -> str | None:
    """Return the canonical category, or None for all of them.

    Raises:
        InputError: a category of one's own was chosen and not named.
    """
    name = _named(category, own_category)
    return None if name == ALL_CATEGORIES else canonical_category(name)


def several_categories(category: str, own_category: str | None = None) -> tuple[str, ...]:
    """Return the canonical categories.

    Raises:
        InputError: a category of one's own was chosen and not named.
    """
    return canonical_categories(_named(category, own_category))


def _named(category: str, own_category: str | None) -> str:
    name = (own_category or "").strip() or category.strip()
    if name in ("", OWN_CATEGORY):
        raise InputError("category is not named: choose one of the list, or write one of your own")
    return name


def dataset_name_input() -> io.Input:
    return io.String.Input(
        "dataset_name",
        default="my_dataset",
        tooltip="Folder in ComfyUI's datasets folder. An existing dataset is continued: pairs it has are kept.",
    )


def checkpoint_input(*extra: str, tooltip: str) -> io.Input:
    """Return the combo of ComfyUI's checkpoints, after entries that are no file."""
    return io.Combo.Input("checkpoint", options=[*extra, *host.checkpoint_names()], tooltip=tooltip)


def legacy_checkpoint_input() -> io.Input:
    """Return the combo that named the checkpoint before it was read from the MODEL, for workflows of that time."""
    return io.Combo.Input(
        "checkpoint",
        options=[OF_MODEL, *host.checkpoint_names()],
        default=OF_MODEL,
        tooltip="Of workflows made before the model itself was recorded; it has no effect.",
        extra_dict={"hidden": True},
    )
