"""A training's events as lines of JSON: from a process that trains to the one that shows how it goes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from ..files import append_text, write_atomically
from .events import StepRecord, TrainingEvents
from .metrics import Metrics
from .samples import Samples


class EventLines:
    """Writes a line for each step, drawing and the end; `follow_line` reads them.

    Args:
        write: takes a line, its end included.
    """

    def __init__(self, write: Callable[[str], object]):
        self._write = write

    def resumed(self, records: Sequence[Metrics]) -> None:
        self._line(stage="resumed", records=list(records))

    def show(self, record: StepRecord) -> None:
        self._line(stage=record.stage, step=record.step, num_steps=record.num_steps, metrics=record.metrics)

    def samples(self, samples: Samples, paths: list[Path]) -> None:
        pictures = dict(zip(samples.pictures, map(str, paths), strict=True))
        self._line(stage="samples", step=samples.step, pictures=pictures)

    def result(self, path: Path, step: int, records: Sequence[Metrics], *, stopped: bool) -> None:
        self._line(stage="done", expert=str(path), step=step, stopped=stopped, records=list(records))

    def close(self) -> None:
        pass

    def _line(self, **values: object) -> None:
        self._write(json.dumps(values) + "\n")


def follow_line(line: str, events: TrainingEvents) -> dict | None:
    """Hand what a line says on to `events`; return what it says of the end, else None. Other lines are passed over."""
    if not line.startswith('{"stage"'):
        return None
    values = json.loads(line)
    stage = values.pop("stage")
    if stage == "done":
        return values
    if stage == "resumed":
        events.on_resume(values["records"])
    elif stage == "samples":
        pictures = {}
        for prompt, path in values["pictures"].items():
            with Image.open(path, formats=("PNG",)) as picture:
                pictures[prompt] = picture.convert("RGB")
        events.on_samples(Samples(values["step"], pictures))
    else:
        events.on_step(StepRecord(stage, **values))
    return None


def save_samples(samples: Samples, folder: Path) -> list[Path]:
    """Write `step_00050_0.png` (unsafe prompt) and `step_00050_1.png` (safe prompt); return their paths."""
    paths = [folder / f"step_{samples.step:05}_{number}.png" for number in range(len(samples.pictures))]
    for path, picture in zip(paths, samples.pictures.values(), strict=True):
        with write_atomically(path) as temporary:
            picture.save(temporary)
    return paths


def also_written(events: TrainingEvents, file: Path) -> TrainingEvents:
    """Return `events` that are written to a file of lines too, samples as pictures beside it."""
    lines = EventLines(lambda line: append_text(file, line))

    def on_resume(records: Sequence[Metrics]) -> None:
        lines.resumed(records)
        events.on_resume(records)

    def on_step(record: StepRecord) -> None:
        lines.show(record)
        events.on_step(record)

    def on_samples(samples: Samples) -> None:
        lines.samples(samples, save_samples(samples, file.parent))
        events.on_samples(samples)

    return replace(events, on_resume=on_resume, on_step=on_step, on_samples=on_samples)
