"""`safety-experts train`: one expert from a preference dataset."""

import argparse
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, SafetyExpertsError
from ..typed import printable
from .headless import add_comfyui_arguments, check_comfyui_arguments, chosen_comfyui, chosen_files

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint
    from ..preferences.dataset import PreferenceDataset
    from ..training.events import TrainingEvents
    from ..training.recipe import Recipe
    from ..training.retained import RetainedPrompts
    from ..training.trainer import TrainResult

# ComfyUI has its own.
_NOT_IN_COMFYUI = ("tokenizer",)
HELP = "train one LoRA safety expert from a preference dataset"
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="CKPT", help="single-file checkpoint or diffusers folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="preference dataset folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="expert to write (.safetensors)")
    parser.add_argument("--category", metavar="C", help="train on this category's pairs only")
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument(
        "--recipe", metavar="R", help="shipped recipe or YAML file (default: sd15; with --comfyui: the family's)"
    )
    recipe.add_argument("--recipe-from", metavar="FILE", help="recipe and category of this expert, to train it again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    parser.add_argument("--device", help="torch device (default: what accelerate chooses)")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder with CLIP's vocab.json and merges.txt")
    parser.add_argument(
        "--with-expert",
        action="append",
        default=[],
        metavar="FILE",
        help="train on the model with this expert in it, frozen (default: without any); may be repeated",
    )
    parser.add_argument(
        "--retain",
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="prompts that must stay as they are: .txt, prompt pairs or a dataset; may be repeated (recipe redirect)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state an interrupted run left")
    parser.add_argument("--overwrite", action="store_true", help="replace --out when it exists")
    parser.add_argument("--metrics", type=Path, metavar="DIR", help="write metrics.csv and metrics.jsonl")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write TensorBoard events")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases, over the network")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="write pictures of a pair's two prompts")
    parser.add_argument("--sample-every", type=int, default=100, metavar="N", help="... every N steps (default: 100)")
    add_comfyui_arguments(parser, draws=False)
    parser.add_argument("--options", action=_PrintOptions, nargs=0, help="explain every recipe field and objective")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--json-lines", action="store_true", help="print every step and the result as lines of JSON")


class _PrintOptions(argparse.Action):
    """Prints what `--set` takes and ends, as --help does, which must not wait for torch."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ..training.objectives import OBJECTIVES
        from ..training.recipe import Recipe

        for name, field in Recipe.model_fields.items():
            print(f"{name} (default {getattr(Recipe(), name)}): {field.description}" if name != "objective" else name)
        for name, objective in OBJECTIVES.items():
            print(f"  objective={name}: {objective.title}, {objective.source}: {objective.formula}")
            for key, parameter in objective.parameters.model_fields.items():
                if key != "weight":
                    print(f"    {key} (default {parameter.default:g}): {parameter.description}")
        parser.exit()


def run(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out {arguments.out} must end in .safetensors")
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a folder; choose the name of a file")
    if arguments.out.exists() and not (arguments.overwrite or arguments.resume):
        raise InputError(f"--out {arguments.out} exists; choose another name or add --overwrite or --resume")
    if arguments.sample_every < 1:
        raise InputError(f"--sample-every {arguments.sample_every} must be at least 1; leave --samples out for none")
    from ..preferences.categories import canonical_category
    from ..preferences.dataset import PreferenceDataset
    from ..training.event_lines import save_samples
    from ..training.events import TrainingEvents
    from ..training.retained import read_retained
    from ..training.samples import Samples
    from .stopping import stop_when_asked
    from .training_progress import TrainingBars, is_main_process, json_lines

    where = _InComfyUI if check_comfyui_arguments(arguments, _NOT_IN_COMFYUI) else _Here
    category = canonical_category(arguments.category) if arguments.category else None
    retain = {name: prompts for path in arguments.retain for name, prompts in read_retained(path).items()}
    dataset = PreferenceDataset.open(arguments.dataset)
    place = where(arguments, dataset)
    recipe, category = _recipe(arguments, category, dataset, place)

    progress = json_lines() if arguments.json_lines else TrainingBars()

    def show_samples(samples: Samples) -> None:
        progress.samples(samples, save_samples(samples, arguments.samples))

    try:
        with stop_when_asked() as should_stop:
            events = TrainingEvents(
                on_resume=progress.resumed,
                on_step=progress.show,
                on_samples=show_samples,
                should_stop=should_stop,
                sinks=_metrics(arguments, recipe.model_dump(mode="json")),
                sample_every=arguments.sample_every if arguments.samples else 0,
            )
            result = place.train(recipe, events, category, retain)
    finally:
        progress.close()
    if not is_main_process():
        return
    if not isinstance(progress, TrainingBars):
        progress.result(result.path, result.step, result.records, stopped=result.stopped)
    elif arguments.json:
        taken = {"expert": str(result.path), "step": result.step, "steps": len(result.records)}
        taken |= {"shortfall": result.shortfall} if result.shortfall else {}
        print(json.dumps(taken | (result.records[result.step - 1] if result.records else {})))
    elif not result.stopped:
        print(f"{result.path}: weights of step {_steps(result)}, {', '.join(result.expert.categories)}")
    if result.stopped:
        raise SafetyExpertsError(
            f"stopped after {len(result.records)} of {recipe.steps} steps; {result.path} was saved with the weights of "
            f"step {result.step}, the same command with --resume goes on"
        )


class _Here:
    """Training in this process, on a checkpoint or a diffusers folder."""

    recipe_name = "sd15"

    def __init__(self, arguments: argparse.Namespace, dataset: "PreferenceDataset"):
        self._arguments, self._dataset = arguments, dataset

    @functools.cached_property
    def _checkpoint(self) -> "Checkpoint":
        from ..models.checkpoint import load_checkpoint

        return load_checkpoint(self._arguments.model, tokenizer_folder=self._arguments.tokenizer)

    @property
    def sha256(self) -> str | None:
        return self._checkpoint.sha256

    def train(
        self, recipe: "Recipe", events: "TrainingEvents", category: str | None, retain: "RetainedPrompts"
    ) -> "TrainResult":
        from ..experts.expert_file import load_expert
        from ..training.trainer import train_expert

        return train_expert(
            self._checkpoint,
            self._dataset,
            recipe,
            self._arguments.out,
            events=events,
            category=category,
            device=self._arguments.device,
            with_experts=[load_expert(path) for path in self._arguments.with_expert],
            resume=self._arguments.resume,
            retain=retain,
        )


class _InComfyUI:
    """Training by a ComfyUI's Train Safety Expert, on the MODEL of its loaders."""

    def __init__(self, arguments: argparse.Namespace, dataset: "PreferenceDataset"):
        from ..training.family_recipes import recipe_for_family

        self._arguments, self._dataset = arguments, dataset
        self._files = chosen_files(arguments)
        self.recipe_name = recipe_for_family(dataset.info.base_checkpoint.family)
        if absent := next((path for path in arguments.with_expert if not Path(path).is_file()), None):
            raise InputError(f"no such file: {absent}; check --with-expert")

    @property
    def sha256(self) -> str:
        from ..files import sha256_of_file

        return sha256_of_file(self._files.model)

    def train(
        self, recipe: "Recipe", events: "TrainingEvents", category: str | None, retain: "RetainedPrompts"
    ) -> "TrainResult":
        from ..headless.training import train_in_comfyui

        self._dataset.training_pairs(category)  # says at once when there are none
        return train_in_comfyui(
            chosen_comfyui(self._arguments, lambda done, total: None, events.should_stop),
            self._files,
            self._dataset,
            recipe,
            self._arguments.out,
            events=events,
            category=category,
            with_experts=[Path(path) for path in self._arguments.with_expert],
            resume=self._arguments.resume,
            retain=retain,
        )


def _steps(result: "TrainResult") -> str:
    return f"{result.step}" + (f" of {len(result.records)} taken" if result.step < len(result.records) else "")


def _recipe(
    arguments: argparse.Namespace, category: str | None, dataset: "PreferenceDataset", place: _Here | _InComfyUI
) -> "tuple[Recipe, str | None]":
    """Return (recipe, category), those of an expert to train again; warn where the result must differ."""
    from ..experts.expert_file import load_expert
    from ..training.recipe import load_recipe, recipe_of_expert

    if not arguments.recipe_from:
        return load_recipe(arguments.recipe or place.recipe_name, arguments.set), category
    expert = load_expert(arguments.recipe_from)
    recipe, own_category = recipe_of_expert(expert, arguments.set)
    trained = expert.info.trained
    assert trained  # else it has no recipe
    frozen = [printable(parent.name) for parent in trained.trained_with]
    given = len(arguments.with_expert)
    if expert.info.base_checkpoint.patches:  # on a MODEL with LoRAs on it, of which only a hash is known
        if not given:
            raise InputError(
                f"{arguments.recipe_from} was trained on a model with LoRAs on it: give them with --with-expert"
            )
    elif len(frozen) != given:
        wanted = " ".join(f"--with-expert {name}.safetensors" for name in frozen) or "no --with-expert"
        raise InputError(f"{arguments.recipe_from} was trained with {len(frozen)} experts in the model: give {wanted}")
    differences = {
        "dataset": dataset.fingerprint() != trained.dataset_fingerprint,
        "model": place.sha256 != expert.info.base_checkpoint.sha256,
        "recipe": bool(arguments.set) or bool(trained.resumed_with),
    }
    if different := [name for name, differs in differences.items() if differs]:
        logger.warning("the %s differs from what %s was trained with", " and the ".join(different), expert.name)
    return recipe, category or own_category


def _metrics(arguments: argparse.Namespace, recipe: dict) -> list:
    from ..training.metrics import MetricsFiles, TensorBoard, WeightsAndBiases
    from .training_progress import is_main_process

    sinks: list = []
    if not is_main_process():
        return sinks
    if arguments.metrics:
        sinks.append(MetricsFiles(arguments.metrics))
    if arguments.tensorboard:
        sinks.append(TensorBoard(arguments.tensorboard))
    if arguments.wandb:
        run_id = hashlib.sha256(str(arguments.out.resolve()).encode()).hexdigest()[:16]
        sinks.append(WeightsAndBiases(arguments.wandb, arguments.out.stem, run_id, recipe))
    return sinks
