"""What `train` shows while it works: bars for people, or a line of JSON a step for programs."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..training.event_lines import EventLines
from ..training.events import StepRecord
from ..training.metrics import Metrics
from ..training.redirect import LEAK, RESIDUAL
from ..training.samples import Samples
from .progress import Bars


def is_main_process() -> bool:
    """Whether this process is to print: the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


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


def json_lines() -> EventLines:
    """Return what prints a line for each step, drawing and the end: what `nodes/launch.py` reads of its processes."""
    return EventLines(lambda line: print(line, end="", flush=True))
