"""What `train` shows while it works: bars for people, or a line of JSON a step for programs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from ..training.events import StepRecord
from ..training.metrics import Metrics
from ..training.redirect import LEAK, RESIDUAL
from ..training.samples import Samples
from ..training.trainer import TrainResult
from .progress import Bars


def is_main_process() -> bool:
    """Whether this process is to print: the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def save_samples(samples: Samples, folder: Path) -> list[Path]:
    """Write `step_00050_0.png` (unsafe prompt) and `step_00050_1.png` (safe prompt); return their paths."""
    paths = [folder / f"step_{samples.step:05}_{number}.png" for number in range(len(samples.pictures))]
    for path, picture in zip(paths, samples.pictures.values(), strict=True):
        with write_atomically(path) as temporary:
            picture.save(temporary)
    return paths


class TrainingBars:
    """One bar for each stage, with loss and accuracy, or residual and leak."""

    def __init__(self) -> None:
        self._bars = Bars(is_hidden=False)

    def show(self, record: StepRecord) -> None:
        shown = {"loss": "loss", "accuracy": "rewards/accuracies", "residual": RESIDUAL, "leak": LEAK}
        numbers = {name: record.metrics[key] for name, key in shown.items() if key in record.metrics}
        self._bars.show(record.stage, record.step, record.num_steps, **numbers)

    def resumed(self, records: Sequence[Metrics]) -> None:
        pass

    def samples(self, samples: Samples, paths: list[Path]) -> None:
        pass

    def close(self) -> None:
        self._bars.close()


class JsonLines:
    """A line for each step, drawing and the end: what `nodes/launch.py` reads of its processes."""

    def resumed(self, records: Sequence[Metrics]) -> None:
        _print(stage="resumed", records=list(records))

    def show(self, record: StepRecord) -> None:
        _print(stage=record.stage, step=record.step, num_steps=record.num_steps, metrics=record.metrics)

    def samples(self, samples: Samples, paths: list[Path]) -> None:
        pictures = dict(zip(samples.pictures, map(str, paths), strict=True))
        _print(stage="samples", step=samples.step, pictures=pictures)

    def result(self, result: TrainResult) -> None:
        _print(stage="done", expert=str(result.path), step=result.step, stopped=result.stopped, records=result.records)

    def close(self) -> None:
        pass


def _print(**values: object) -> None:
    print(json.dumps(values), flush=True)
