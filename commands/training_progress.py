"""What `train` shows while it works: bars for people, or a line of JSON a step for programs."""

import json
import os
from pathlib import Path

from tqdm import tqdm

from ..files import write_atomically
from ..training.samples import Samples
from ..training.trainer import StepRecord, TrainResult


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


class Bars:
    """One bar for each stage, with loss and accuracy."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def show(self, record: StepRecord) -> None:
        if self._bar is None or self._stage != record.stage:
            self.close()
            self._bar, self._stage = tqdm(total=record.num_steps, desc=record.stage), record.stage
        self._bar.update(record.step - self._bar.n)
        if record.metrics:
            self._bar.set_postfix({name: f"{record.metrics[name]:.3g}" for name in ("loss", "rewards/accuracies")})

    def samples(self, samples: Samples, paths: list[Path]) -> None:
        pass

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class JsonLines:
    """A line for each step, drawing and the end: what `training.launch` reads of its processes."""

    def show(self, record: StepRecord) -> None:
        _print(stage=record.stage, step=record.step, num_steps=record.num_steps, metrics=record.metrics)

    def samples(self, samples: Samples, paths: list[Path]) -> None:
        pictures = dict(zip(samples.pictures, map(str, paths), strict=True))
        _print(stage="samples", step=samples.step, pictures=pictures)

    def result(self, result: TrainResult) -> None:
        _print(stage="done", expert=str(result.path), stopped=result.stopped, records=result.records)

    def close(self) -> None:
        pass


def _print(**values: object) -> None:
    print(json.dumps(values), flush=True)
