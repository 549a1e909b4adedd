"""Nodes that train an expert."""

import logging

from comfy_api.latest import io

from ..errors import InputError
from ..training.events import StepRecord, TrainingEvents
from ..training.recipe import Recipe, load_recipe, shipped_recipes
from ..training.trainer import TrainingStoppedError, resume_path, train_expert
from . import base_models, checks, host, sockets
from .curve import TrainingPicture
from .launch import train_in_processes
from .native.base import NativeBase, check_base

logger = logging.getLogger(__name__)


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
    def validate_inputs(cls, overrides: str | None = None, recipe: str | None = None) -> bool | str:
        return checks.first_problem((lambda text: load_recipe(recipe or "sd15", _override_lines(text)), overrides))

    @classmethod
    def execute(cls, recipe: str, overrides: str) -> io.NodeOutput:
        return io.NodeOutput(load_recipe(recipe, _override_lines(overrides)))


def _override_lines(text: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


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
                    base_models.OF_DATASET, tooltip="The model to train on: the one that drew the dataset, or another."
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
                io.Int.Input(
                    "sample_every",
                    default=0,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Every so many steps draw an unsafe prompt of the dataset and its safe one; 0: never.",
                ),
                io.Int.Input(
                    "processes",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Share the work between this machine's first GPUs; batch_size must be a multiple.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Train on this MODEL, of any family, LoRAs on it included; `checkpoint` is not used then.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The MODEL's text encoder; needed with a MODEL."),
                io.Vae.Input("vae", optional=True, tooltip="The MODEL's VAE; needed with a MODEL."),
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The expert's weights, for core's Load LoRA Model and Save LoRA."),
                io.LossMap.Output("loss_map", tooltip="The loss of every step, for core's Plot Loss Graph."),
                io.String.Output("expert_name", tooltip="The file's name in the loras folders."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, expert_name: str | None = None, category: str | None = None, own_category: str | None = None
    ) -> bool | str:
        return checks.first_problem(
            (host.fresh_expert_path, expert_name),
            (lambda name: sockets.one_category(name, own_category), category),
        )

    @classmethod
    def execute(
        cls,
        dataset,
        checkpoint,
        category,
        recipe_name,
        expert_name,
        own_category="",
        resume=False,
        recipe=None,
        sample_every=0,
        processes=1,
        model=None,
        clip=None,
        vae=None,
    ) -> io.NodeOutput:
        recipe = recipe or load_recipe(recipe_name)
        category = sockets.one_category(category, own_category)
        dataset.training_pairs(category)  # says at once when there are none of the category
        path = host.fresh_expert_path(expert_name)
        if model is not None:
            checkpoint = native_base(model, clip, vae, dataset, processes, cls.hidden.unique_id)
        else:
            checkpoint = host.open_checkpoint(base_models.find(checkpoint, dataset))
        unfinished = resume_path(host.previous_expert_path(path))
        resume = resume and unfinished.exists()
        if resume:
            unfinished.replace(resume_path(path))
        progress, picture = host.PatientProgress(recipe.steps), TrainingPicture()

        def on_resume(records) -> None:
            for step, metrics in enumerate(records, start=1):
                picture.add_step(StepRecord("train", step, recipe.steps, dict(metrics)))

        def on_step(record: StepRecord) -> None:
            if record.stage == "train":
                picture.add_step(record)
            progress.show(record.step, record.num_steps, picture.draw if record.stage == "train" else None)

        events = TrainingEvents(
            on_resume=on_resume,
            on_step=on_step,
            on_samples=picture.add_samples,
            should_stop=progress.is_cancelled,
            sample_every=sample_every,
        )
        options = {"events": events, "category": category, "resume": resume}
        with host.training_on_device() as device:
            try:
                if processes > 1:
                    result = train_in_processes(processes, checkpoint, dataset, recipe, path, device=device, **options)
                else:
                    loader = checkpoint.load_policy if model is not None else None
                    result = train_expert(
                        checkpoint, dataset, recipe, path, device=device, policy_loader=loader, **options
                    )
            except TrainingStoppedError:
                progress.raise_cancel()
                raise
        name = host.expert_name(result.path)
        if result.stopped:
            logger.warning(
                "Cancelled after %d of %d steps; step %d saved as %s",
                len(result.records),
                recipe.steps,
                result.step,
                name,
            )
        progress.raise_cancel()
        return io.NodeOutput(result.expert.state_dict(), {"loss": result.losses}, name)


def native_base(model, clip, vae, dataset, processes: int, node_id: str) -> NativeBase:
    """Return MODEL, CLIP and VAE as the base of a training; says where the dataset was drawn by another model.

    Raises:
        InputError: they cannot be trained on, or the dataset's model draws in other latents.
    """
    if processes > 1:
        raise InputError("a connected MODEL trains in one process: set processes to 1, or disconnect it")
    base = NativeBase(model, clip, vae)
    if note := check_base(base, dataset):
        logger.warning("%s", note)
        host.tell(node_id, note, "warn")
    return base
