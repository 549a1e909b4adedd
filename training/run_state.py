"""The whole state of a training run as one safetensors file, written at once or not at all, and read back exactly."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from ..tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from .run import TrainingRun

logger = logging.getLogger(__name__)

# What a run that ran out of memory, or whose loss was not finite, may change to go on.
CHANGEABLE = {
    "name",
    "batch_size",
    "accumulation_steps",
    "gradient_checkpointing",
    "precision",
    "learning_rate",
    "max_grad_norm",
    "save_steps",
}


def save_state(run: "TrainingRun", path: Path, identity: dict) -> None:
    """Write weights, averages, optimizer and records; `identity` says what run it belongs to.

    Raises:
        SafetyExpertsError: the disk is full or the folder cannot be written to; a file of before stays as it is.
    """
    tensors = {f"weight.{name}": value.detach() for name, value in run.parameters.items()}
    tensors.update({f"average.{name}": value for name, value in run.average.items()})
    tensors.update({f"best.{name}": value for name, value in run.best.items()})
    for name, parameter in run.parameters.items():
        for kind, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{kind}.{name}"] = torch.as_tensor(value)
    progress = {"records": run.records, "best_step": run.best_step, "changes": run.changes, "untrained": run.untrained}
    metadata = {"identity": json.dumps(identity, sort_keys=True), "progress": json.dumps(progress)}
    write_tensors(path, {key: value.cpu().contiguous() for key, value in tensors.items()}, metadata)


def restore_state(run: "TrainingRun", path: Path, identity: dict) -> None:
    """Go on from a file of `save_state`.

    Raises:
        InputError: the file is missing, damaged, or belongs to another recipe, dataset or checkpoint.
    """
    try:
        tensors, metadata = read_tensors(path)
        saved, progress = json.loads(metadata["identity"]), json.loads(metadata["progress"])
        changes = _changes(saved, json.loads(json.dumps(identity)), path)
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                run.average[name].copy_(tensors[f"average.{name}"])
                run.best[name].copy_(tensors[f"best.{name}"])
        _restore_optimizer(run, tensors)
        run.records, run.best_step, run.changes = progress["records"], progress["best_step"], progress["changes"]
        run.untrained = progress.get("untrained", {})  # states of before had it measured again
    except InputError as error:
        raise InputError(f"cannot resume from {path}: {error}") from error
    except (KeyError, ValueError, RuntimeError) as error:  # a key is missing, no JSON, or a tensor of another shape
        raise InputError(
            f"cannot resume from {path}: it is damaged or no training state ({error}); train again without resuming"
        ) from error
    if changes:
        run.changes = [*run.changes, {"step": run.step, "recipe": changes}]
        logger.warning("resumed with other options than before: the result is not that of an uninterrupted run")


def _restore_optimizer(run: "TrainingRun", tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            kind, _, name = rest.partition(".")
            parameter = run.parameters[name]
            # The moments lie beside the weights; of a fused optimizer the step counter too.
            is_beside = kind != "step" or run.optimizer.defaults["fused"]
            run.optimizer.state[parameter][kind] = value.to(parameter.device) if is_beside else value


def _changes(saved: dict, identity: dict, path: Path) -> dict:
    """Return the recipe fields that changed, with their new values; everything else must be the same."""
    recipe_before, recipe = saved.get("recipe", {}), identity.get("recipe", {})
    changed = {key: value for key, value in recipe.items() if recipe_before.get(key) != value}
    wrong = {key: (recipe_before.get(key), value) for key, value in changed.items() if key not in CHANGEABLE}
    wrong |= {k: (saved.get(k), value) for k, value in identity.items() if k != "recipe" and saved.get(k) != value}
    for key, (before, now) in wrong.items():
        raise InputError(f"its {key} was {before!r}, now it is {now!r}; use the same or train again without resuming")
    return changed
