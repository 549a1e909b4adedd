"""The node that holds every training option."""

from typing import Any

from comfy_api.latest import io

from ..training.recipe import Recipe, load_recipe, shipped_recipes
from . import checks, sockets

AS_RECIPE = "as the recipe"


def _number(widget: type, name: str, maximum: float, **options: Any) -> io.Input:
    """Return a widget of which 0 leaves the option as the recipe has it."""
    tooltip = f"{Recipe.model_fields[name].description} 0: {AS_RECIPE} says."
    return widget(name, default=0, min=0, max=maximum, optional=True, tooltip=tooltip, **options)


class SafetyExpertsRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsRecipe",
            display_name="Training Recipe",
            category="safety experts/training",
            description="Every training option as one value: a shipped recipe, with the options you want to change.",
            search_aliases=["hyperparameters", "training options", "DPO"],
            inputs=[
                io.Combo.Input(
                    "recipe", options=shipped_recipes(), default="sd15", tooltip="The recipe to start from."
                ),
                io.String.Input(
                    "overrides",
                    multiline=True,
                    default="",
                    placeholder="save_steps=50\nanchor_weight=1e4",
                    tooltip="Any other option, one option=value a line; # starts a comment. The help page lists all.",
                ),
                _number(io.Int.Input, "steps", 1_000_000),
                _number(io.Float.Input, "learning_rate", 10.0, step=1e-5, round=1e-8),
                _number(io.Int.Input, "rank", 1024),
                _number(io.Float.Input, "alpha", 100_000.0, step=1.0, round=1e-4),
                _number(io.Float.Input, "beta", 1e9, step=100.0, round=1e-4),
                _number(io.Int.Input, "batch_size", 4096),
                io.Combo.Input(
                    "precision",
                    options=[AS_RECIPE, "auto", "fp32", "bf16", "fp16"],
                    default=AS_RECIPE,
                    optional=True,
                    tooltip=Recipe.model_fields["precision"].description,
                ),
                _number(io.Int.Input, "resolution", 16384, step=64),
            ],
            outputs=[sockets.Recipe.Output("recipe", tooltip="For Train Safety Expert.")],
        )

    # The recipe is not named, so that ComfyUI checks it: a name that is not in the list would be read as a path.
    # Options are tried on a recipe of no terms of its own, with which nothing can be at odds.
    @classmethod
    def validate_inputs(cls, overrides: str | None = None) -> bool | str:
        return checks.first_problem((lambda text: load_recipe("alignguard", _lines(text)), overrides))

    @classmethod
    def execute(cls, recipe: str, overrides: str, **options: Any) -> io.NodeOutput:
        changed = [f"{name}={value}" for name, value in options.items() if value not in (None, 0, AS_RECIPE)]
        return io.NodeOutput(load_recipe(recipe, [*changed, *_lines(overrides)]))


def _lines(text: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]
