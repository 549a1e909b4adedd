"""Metrics of every step, written while training: CSV and JSON lines, TensorBoard, Weights & Biases.

A resumed run hands over the records of its earlier steps, so no step is missing or double however it was interrupted.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError
from ..files import append_text, remove_leftovers, write_atomically

Metrics = Mapping[str, float]


class MetricsSink(Protocol):
    """Takes the metrics of one run, step by step."""

    def start(self, records: Sequence[Metrics]) -> None:
        """Begin with the metrics of the steps before a resumption: none for a fresh run, which replaces an old one."""

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of `step`, from 1; they may hold names that earlier steps did not."""

    def close(self) -> None: ...


class MetricsFiles:
    """`metrics.csv` and `metrics.jsonl` in a folder, one line a step, appended as it is taken.

    The CSV is written anew when a step brings a new column, say the first held-out measurement.
    """

    def __init__(self, folder: str | Path):
        self.csv_path, self.json_path = Path(folder) / "metrics.csv", Path(folder) / "metrics.jsonl"
        self._rows: list[dict[str, float]] = []
        self._columns = ["step"]

    def start(self, records: Sequence[Metrics]) -> None:
        self._rows = [{"step": number, **record} for number, record in enumerate(records, start=1)]
        self._columns = list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))
        for path in (self.csv_path, self.json_path):
            remove_leftovers(path)
        self._write_csv()
        with write_atomically(self.json_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")

    def add(self, step: int, metrics: Metrics) -> None:
        row = {"step": step, **metrics}
        self._rows.append(row)
        append_text(self.json_path, json.dumps(row) + "\n")
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._write_csv()
        else:
            line = io.StringIO()
            csv.DictWriter(line, self._columns).writerow(row)
            append_text(self.csv_path, line.getvalue())

    def close(self) -> None:
        pass

    def _write_csv(self) -> None:
        with write_atomically(self.csv_path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


class TensorBoard:
    """Event files in a folder.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard is not installed: pip install tensorboard, or train without it") from error
        self._folder, self._writer_class = folder, SummaryWriter
        self._writer: Any = None

    def start(self, records: Sequence[Metrics]) -> None:
        # Events of before may lack their last steps or have too many: readers drop them, and all are written again.
        self._writer = self._writer_class(str(self._folder), purge_step=1)
        for step, metrics in enumerate(records, start=1):
            self.add(step, metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project; goes over the network unless WANDB_MODE says offline.

    Args:
        run_id: the same for a run and its resumptions.
        config: shown beside the run.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, run_id: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError("wandb is not installed: pip install wandb, or train without it") from error
        self._init = wandb.init
        self._run: Any = None
        self._options = {"project": project, "name": name, "id": run_id, "config": dict(config)}

    def start(self, records: Sequence[Metrics]) -> None:
        # wandb ignores steps it has already.
        self._run = self._init(**self._options, resume="allow" if records else None)
        for step, metrics in enumerate(records, start=1):
            self.add(step, metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._run:
            self._run.finish()
