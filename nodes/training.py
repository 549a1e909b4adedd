"""Nodes that train an expert."""

import logging
from functools import partial
from pathlib import Path

from comfy_api.latest import io

from ..errors import InputError, SafetyExpertsError
from ..preferences.dataset import PreferenceDataset
from ..training.recipe import Recipe, load_recipe, shipped_recipes
from ..training.trainer import StepRecord, TrainingStoppedError, resume_path, train_expert
from . import host, sockets
from .curve import draw_curves

logger = logging.getLogger(__name__)

DATASETS_CHECKPOINT = "(the one that drew the dataset)"


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
                    placeholder="steps=100\nlearning_rate=1e-4",
                    tooltip=f"One option=value a line; # starts a comment. Options: {', '.join(Recipe.model_fields)}.",
                ),
            ],
            outputs=[sockets.Recipe.Output("recipe")],
        )

    @classmethod
    def execute(cls, recipe: str, overrides: str) -> io.NodeOutput:
        lines = [line.partition("#")[0].strip() for line in overrides.splitlines()]
        return io.NodeOutput(load_recipe(recipe, [line for line in lines if line]))


class SafetyExpertsTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsTrain",
            display_name="Train Safety Expert",
            category="safety experts/training",
            description=(
                "Trains a LoRA that prefers the chosen images of a dataset over the rejected ones (Diffusion-DPO) "
                "and saves it to output/loras. Cancel saves what there is."
            ),
            search_aliases=["DPO", "train LoRA", "AlignGuard", "SafetyDPO", "preference optimization"],
            is_output_node=True,
            inputs=[
                sockets.Dataset.Input("dataset"),
                sockets.checkpoint_input(
                    DATASETS_CHECKPOINT, tooltip="The model to train on: the one that drew the dataset, or another."
                ),
                *sockets.category_inputs(with_all=True),
                io.Combo.Input(
                    "recipe_name",
                    options=shipped_recipes(),
                    default="sd15",
                    tooltip="A shipped recipe; a connected Training Recipe replaces it.",
                ),
                io.String.Input(
                    "expert_name", default="my_expert", tooltip="File name in output/loras; a counter is added."
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Go on where the last training of this name was stopped; the options must be the same.",
                ),
                sockets.Recipe.Input("recipe", optional=True, tooltip="From Training Recipe, to change options."),
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The expert's weights, for core's Load LoRA Model and Save LoRA."),
                io.LossMap.Output("loss_map", tooltip="The loss of every step, for core's Plot Loss Graph."),
                io.String.Output("expert_name", tooltip="The file's name in the loras folders."),
            ],
        )

    @classmethod
    def execute(
        cls, dataset, checkpoint, category, recipe_name, expert_name, own_category="", resume=False, recipe=None
    ) -> io.NodeOutput:
        recipe = recipe or load_recipe(recipe_name)
        path = host.fresh_expert_path(expert_name)
        checkpoint_path = _base_of(dataset) if checkpoint == DATASETS_CHECKPOINT else host.checkpoint_path(checkpoint)
        unfinished = resume_path(host.previous_expert_path(path))
        resume = resume and unfinished.exists()
        if resume:
            unfinished.replace(resume_path(path))
        progress = host.PatientProgress(recipe.steps)
        curves: dict[str, list[float]] = {"loss": [], "margin": []}

        def on_step(record: StepRecord) -> None:
            draw = None
            if record.stage == "train":
                curves["loss"].append(record.metrics["loss"])
                curves["margin"].append(record.metrics["rewards/margins"])
                draw = partial(draw_curves, curves, record.step, record.num_steps)
            progress.show(record.step, record.num_steps, draw)

        with host.training_on_device() as device:
            try:
                result = train_expert(
                    checkpoint_path,
                    dataset,
                    recipe,
                    path,
                    category=sockets.one_category(category, own_category),
                    device=device,
                    tokenizer_folder=host.clip_tokenizer_folder(),
                    resume=resume,
                    on_step=on_step,
                    should_stop=progress.is_cancelled,
                )
            except TrainingStoppedError:
                progress.raise_cancel()
                raise
        name = host.expert_name(result.path)
        if result.stopped:
            logger.warning("Cancelled after %d of %d steps; saved as %s", len(result.records), recipe.steps, name)
        progress.raise_cancel()
        return io.NodeOutput(result.expert.state_dict(), {"loss": result.losses}, name)


def _base_of(dataset: PreferenceDataset) -> Path:
    """Return the path of the checkpoint that drew the dataset, if it is still the same file."""
    name = dataset.info.base_checkpoint.get("name", "")
    try:
        path = host.checkpoint_path(name)
    except InputError as error:
        raise InputError(
            f"the checkpoint that drew the dataset, {name!r}, is not in ComfyUI's checkpoints folders: "
            "put it there or choose one in `checkpoint`"
        ) from error
    if host.base_checkpoint(name)["sha256"] != dataset.info.base_checkpoint.get("sha256"):
        raise SafetyExpertsError(
            f"{name} is no longer the file that drew the dataset: choose it in `checkpoint` to train on it all the same"
        )
    return path
