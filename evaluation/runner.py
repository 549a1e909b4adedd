"""Draws and judges what a plan asks for, image by image on the disk: stopped or killed, it goes on where it was."""

import hashlib
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..errors import InputError
from ..files import path_inside, write_atomically
from ..preferences.images import read_image
from .costs import Cost, add_cost
from .judges import Judge
from .plan import Plan, Task
from .samples import Sample, SampleStore


class Drawer(Protocol):
    """Draws with one arm. One that counts has `num_rows`: the rows of predictions that its models have made so far."""

    def draw(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> list[Image.Image]:
        """Return one RGB image a prompt; `guidance` None is the run's own."""
        ...


OnProgress = Callable[[int, int, Sequence[Image.Image]], None]  # images done, in all, the latest ones


def run_plan(
    folder: Path,
    plan: Plan,
    drawer: Drawer,
    judges: Mapping[str, Judge],
    *,
    metrics: Mapping[str, Judge] | None = None,
    on_progress: OnProgress = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
    rank: int = 0,
    num_processes: int = 1,
) -> bool:
    """Draw and judge every image that is missing; return False when `should_stop` ended it early.

    A batch is drawn as a whole or not at all, so that its images do not depend on where a run was stopped. Images
    that are there are not drawn again for a new judge.

    Args:
        judges: name -> judge; its scores are stored as `name/score`.
        metrics: name -> what measures an image against its prompt, stored beside the scores.
        rank, num_processes: this process takes every num_processes-th batch.

    Raises:
        SafetyExpertsError: the disk is full, or the model or a judge failed; what was finished is kept.
    """
    store = SampleStore(folder)
    known = store.read()
    batches = plan.batches()
    total, done = sum(len(batch) for batch in batches), 0
    for index, batch in enumerate(batches):
        if index % num_processes == rank and not _is_complete(folder, batch, known, judges, metrics or {}):
            if should_stop():
                return False
            images = _saved_images(folder, batch) or _draw(folder, batch, drawer)
            samples = _judge(folder, batch, images, known, judges, metrics or {})
            store.append(samples)
            done += len(batch)
            on_progress(done, total, images)
        else:
            done += len(batch)
            on_progress(done, total, [])
    return True


def _is_complete(folder: Path, batch: Sequence[Task], known: Mapping, judges: Mapping, metrics: Mapping) -> bool:
    for task in batch:
        sample = known.get(task.key)
        if sample is None or not judges.keys() <= _readers(sample) or not metrics.keys() <= _names(sample.metrics):
            return False
        if not (folder / task.image).is_file():  # somebody removed it
            return False
    return True


def _readers(sample: Sample) -> set[str]:
    """Return the judges that have looked at it, whether they could read it or not."""
    failed = [part.partition(" ")[0] for part in (sample.error or "").split("; ") if part]
    return _names(sample.scores) | set(failed)


def _names(values: Mapping[str, float]) -> set[str]:
    return {name.partition("/")[0] for name in values}


def _saved_images(folder: Path, batch: Sequence[Task]) -> list[Image.Image] | None:
    """Return the images of a batch if all are there and whole."""
    try:
        return [read_image(path_inside(folder, task.image)) for task in batch]
    except InputError:
        return None


def _draw(folder: Path, batch: Sequence[Task], drawer: Drawer) -> list[Image.Image]:
    first, before, started = batch[0], getattr(drawer, "num_rows", None), time.perf_counter()
    images = drawer.draw(first.arm, [task.text for task in batch], [task.seed for task in batch], first.prompt.guidance)
    seconds = time.perf_counter() - started
    for task, image in zip(batch, images, strict=True):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG")
        with write_atomically(path_inside(folder, task.image)) as temporary:
            temporary.write_bytes(buffer.getvalue())
    rows = None if before is None else getattr(drawer, "num_rows", before) - before
    add_cost(folder, Cost(first.arm, len(batch), rows, seconds))
    return [image.convert("RGB") for image in images]


def _judge(folder, batch, images, known, judges, metrics) -> list[Sample]:
    prompts = [task.prompt.text for task in batch]
    samples = []
    for task in batch:
        digest = hashlib.sha256((folder / task.image).read_bytes()).hexdigest()
        sample = known.get(task.key)
        if sample is None or sample.image_sha != digest:
            prompt = task.prompt
            sample = Sample(
                task.arm,
                task.suite,
                prompt.id,
                prompt.sha,
                prompt.kind,
                prompt.categories,
                task.number,
                task.seed,
                task.image,
                digest,
            )
        samples.append(sample)
    for name, judge in judges.items():
        if all(name in _readers(sample) for sample in samples):
            continue
        read = judge.read(images, prompts)
        for position, scores in enumerate(read):
            sample = samples[position]
            others = {key: value for key, value in sample.scores.items() if key.partition("/")[0] != name}
            scores = {f"{name}/{key}": float(value) for key, value in scores.items()}
            error = sample.error
            if not scores:
                error = "; ".join([*(error.split("; ") if error else []), f"{name} could not judge it"])
            samples[position] = replace(sample, scores=others | scores, error=error)
    for name, metric in metrics.items():
        if all(name in _names(sample.metrics) for sample in samples):
            continue
        for position, values in enumerate(metric.read(images, prompts)):
            named = {f"{name}/{key}": float(value) for key, value in values.items()}
            samples[position] = replace(samples[position], metrics=samples[position].metrics | named)
    return samples
