"""The node that trains an expert."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..errors import InputError
from ..experts.expert import Expert
from ..experts.expert_file import load_expert
from ..files import sha256_of_file
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset
from ..training.event_lines import also_written
from ..training.events import StepRecord, TrainingEvents
from ..training.family_recipes import family_mismatch, recipe_for_family
from ..training.identity import finished_training
from ..training.metrics import Metrics
from ..training.recipe import Recipe, load_recipe, shipped_recipes
from ..training.retained import groups_of_prompts
from ..training.samples import Samples
from ..training.trainer import TrainingStoppedError, TrainResult, resume_path, train_expert
from ..training.watching.recorder import ALL_REQUESTS, STOP, RunRecorder, recorded
from . import base_models, checks, host, sockets
from .curve import TrainingPicture
from .launch import train_in_processes
from .native.base import NativeBase, check_base
from .native.verification import check_loads
from .watching import as_batch, first_and_last_samples, write_preview

logger = logging.getLogger(__name__)

AUTO = "auto"


class SafetyExpertsTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsTrain",
            display_name="Train Safety Expert",
            category="safety experts/training",
            description=(
                "Trains a LoRA that prefers the chosen images of a dataset over the rejected ones (Diffusion-DPO) "
                "and saves it to output/loras. Cancel saves what there is; a finished training is given back."
            ),
            search_aliases=["DPO", "train LoRA", "AlignGuard", "SafetyDPO", "preference optimization"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                sockets.Dataset.Input("dataset", tooltip="The pairs to learn from; reviewed ones count as reviewed."),
                sockets.checkpoint_input(
                    base_models.OF_DATASET, tooltip="The model to train on: the one that drew the dataset, or another."
                ),
                *sockets.category_inputs(with_all=True),
                io.Combo.Input(
                    "recipe_name",
                    options=[AUTO, *shipped_recipes()],
                    default=AUTO,
                    tooltip="A shipped recipe, auto: by the model's family. A connected Training Recipe replaces it.",
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
                io.Boolean.Input(
                    "train_again",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Train also when an expert of this name is this very training's, and finished.",
                ),
                io.String.Input(
                    "retain",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="Prompts that must stay as they are (recipe redirect), one a line; a blank line begins "
                    "another group.",
                ),
            ],
            outputs=[
                io.LoraModel.Output("lora", tooltip="The expert's weights, for core's Load LoRA Model and Save LoRA."),
                io.LossMap.Output("loss_map", tooltip="The loss of every step, for core's Plot Loss Graph."),
                io.String.Output("expert_name", tooltip="The file's name in the loras folders."),
                sockets.Expert.Output("expert", tooltip="For Merge and Apply Safety Expert."),
                io.Image.Output(
                    "samples_before",
                    tooltip="Drawn before training, the unsafe prompt first; Compare Before and After blurs it.",
                ),
                io.Image.Output("samples_after", tooltip="Drawn last, from the same noise; needs sample_every."),
            ],
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
        dataset: PreferenceDataset,
        checkpoint: str,
        category: str,
        recipe_name: str,
        expert_name: str,
        own_category: str = "",
        resume: bool = False,
        recipe: Recipe | None = None,
        sample_every: int = 0,
        processes: int = 1,
        model=None,
        clip=None,
        vae=None,
        train_again: bool = False,
        retain: str = "",
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        wanted = sockets.one_category(category, own_category)
        dataset.training_pairs(wanted)  # says at once when there are none of the category
        retained = groups_of_prompts(retain or "")
        if retained and processes > 1:
            raise InputError("prompts to retain are for one process: set processes to 1, or disconnect `retain`")
        path = host.fresh_expert_path(expert_name)
        base: NativeBase | Checkpoint
        if model is not None:
            base = native_base(model, clip, vae, dataset, processes, node_id)
        else:
            base = host.open_checkpoint(base_models.find(checkpoint, dataset))
        if recipe is None:
            recipe = load_recipe(recipe_for_family(base.family) if recipe_name == AUTO else recipe_name)
        if mismatch := family_mismatch(recipe.name, base.family):
            host.tell(node_id, mismatch, "warn")
        for earlier in () if train_again else host.earlier_experts(path):
            if expert := finished_training(earlier, recipe, dataset, base, wanted, retain=retained):
                name = host.expert_name(earlier)
                host.tell(node_id, f"{name} is this very training, finished: given back. To repeat it: train_again")
                return _output(expert, host.read_losses(earlier), earlier)
        stopped = host.stopped_training(path)
        if resume and stopped is None:
            raise InputError(
                f"nothing to resume for {expert_name}: no training of this name was stopped; turn `resume` off"
            )
        if resume and stopped:
            stopped.replace(resume_path(path))

        progress = host.PatientProgress(recipe.steps)
        picture = TrainingPicture(is_blurred=host.blurs_unsafe())
        recorder = RunRecorder(
            path,
            recipe,
            base=base.id.name or "",
            dataset=host.dataset_name(dataset.folder) or "",
            categories=[wanted] if wanted else (),
            continues=stopped if resume else None,
            memory=host.memory_used,
            takes=ALL_REQUESTS if processes == 1 else [STOP],
        )

        def on_resume(records: Sequence[Metrics]) -> None:
            picture.resume(records)
            recorder.resume(records)

        def on_samples(samples: Samples) -> None:
            picture.add_samples(samples)
            recorder.add_samples(samples)

        def on_step(record: StepRecord) -> None:
            if record.stage == "train":
                picture.add_step(record)
            recorder.add_step(record)
            progress.show(record.step, record.num_steps, picture.draw if record.stage == "train" else None)

        events = TrainingEvents(
            on_resume=on_resume,
            on_step=on_step,
            on_samples=on_samples,
            on_saved=recorder.add_saved,
            should_stop=lambda: progress.is_cancelled() or recorder.is_stopped(),
            take_requests=recorder.take_requests,
            sample_every=sample_every,
        )
        if lines := host.told_by_command("training_events"):
            events = also_written(events, lines)
        with host.training_on_device() as device, host.running(recorder, node_id), recorded(recorder):
            try:
                if processes > 1:
                    result = train_in_processes(
                        processes, base, dataset, recipe, path,
                        events=events, category=wanted, device=device, resume=resume,
                    )  # fmt: skip
                else:
                    result = train_expert(
                        base, dataset, recipe, path,
                        events=events, category=wanted, device=device, resume=resume,
                        policy_loader=base.load_policy if model is not None else None, retain=retained,
                    )  # fmt: skip
            except TrainingStoppedError as error:
                host.tell(node_id, str(error), "warn")
                progress.raise_cancel()
                raise
            recorder.end("stopped" if result.stopped else "finished", result.shortfall or "")
        host.write_metrics(path, result.records)
        if model is not None:
            check_loads(model, load_expert(path))
        if result.stopped:
            _say_what_is_saved(node_id, result, recipe.steps)
        if result.shortfall:
            host.tell(node_id, f"The expert falls short of its target: {result.shortfall}", "warn")
        write_preview(path, is_blurred=host.blurs_unsafe())
        progress.raise_cancel()
        return _output(result.expert, result.losses, path)


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


def _say_what_is_saved(node_id: str, result: TrainResult, num_steps: int) -> None:
    text = (
        f"Stopped after {len(result.records)} of {num_steps} steps: the expert of step {result.step} is saved as "
        f"{host.expert_name(result.path)}, marked as unfinished. Queue it again with `resume` on to go on"
    )
    logger.warning(text)
    host.tell(node_id, text, "warn")


def _output(expert: Expert, losses: Sequence[float] | None, path: Path) -> io.NodeOutput:
    # Without losses what is linked to them does not run; core's plot fails on an empty curve. So with samples.
    loss_map = {"loss": list(losses)} if losses else ExecutionBlocker(None)
    samples: list[object] = [as_batch(images) for images in first_and_last_samples(path)] or [ExecutionBlocker(None)]
    name = host.expert_name(path)
    expert = replace(expert, name=path.stem, file_sha256=sha256_of_file(path))
    shown = {"safety_experts_run": [{"run": name.removesuffix(".safetensors")}]}
    return io.NodeOutput(expert.state_dict(), loss_map, name, expert, samples[0], samples[-1], ui=shown)
