"""Writes down what a training reports, so that it can be watched from anywhere, and hands it what watchers ask for."""

import contextlib
import datetime
import json
import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError, SafetyExpertsError
from ...files import append_text, write_atomically
from ...typed import printable
from ..events import SAMPLE, SAVE, StepRecord
from ..metrics import Metrics
from ..recipe import Recipe
from ..samples import Samples
from ..trainer import TrainingStoppedError, resume_path
from .run_files import Memory, RunState, metrics_path, run_folder, sample_path

_log = logging.getLogger(__name__)
STOP = "stop"
ALL_REQUESTS = (STOP, SAMPLE, SAVE)
_INTERVAL_SECONDS = 1.0
_STEPS_OF_PACE = 50  # time left is judged by the last so many


class RunRecorder:
    """The written side of one training, from before its first step to its end; asked by other threads.

    A disk that is full or gone stops the record, with one warning, never the training.

    Args:
        expert: the file that the training is going to write.
        continues: the expert of the stopped training that this one resumes; its samples are taken over.
        memory: returns what is used now.
        takes: the requests that this training can follow.
    """

    def __init__(
        self,
        expert: Path,
        recipe: Recipe,
        *,
        base: str = "",
        dataset: str = "",
        categories: Sequence[str] = (),
        continues: Path | None = None,
        memory: Callable[[], Memory | None] = lambda: None,
        takes: Collection[str] = ALL_REQUESTS,
    ) -> None:
        self.expert, self.takes = expert, tuple(takes)
        self._memory, self._begin = memory, time.monotonic()
        started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        about = {"recipe": recipe.name, "base": base, "dataset": dataset, "categories": tuple(categories)}
        self._state = RunState(started=started, num_steps=recipe.steps, **about)
        self._requests: set[str] = set()
        self._lock = threading.Lock()
        self._next_write = 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=_STEPS_OF_PACE)
        self._is_broken = False
        with self._writing():
            metrics_path(expert).unlink(missing_ok=True)
            shutil.rmtree(run_folder(expert), ignore_errors=True)
            if continues and (earlier := run_folder(continues) / "samples").is_dir():
                shutil.copytree(earlier, run_folder(expert) / "samples")
        self._update(at_once=True)

    # --- what the training reports ---

    def resume(self, records: Sequence[Metrics]) -> None:
        """Take the metrics of the steps before a resumption."""
        with self._writing(), write_atomically(metrics_path(self.expert), sync=False) as temporary:
            temporary.write_text("".join(json.dumps(dict(record)) + "\n" for record in records), encoding="utf-8")

    def add_step(self, record: StepRecord) -> None:
        now = time.monotonic()
        if record.stage != self._state.stage:
            self._pace.clear()
        self._pace.append((now, record.step))
        if record.stage == "train":
            with self._writing():
                append_text(metrics_path(self.expert), json.dumps(record.metrics) + "\n")
        (first, first_step), left = self._pace[0], record.num_steps - record.step
        passed = record.step - first_step
        seconds_left = (now - first) / passed * left if passed > 0 and record.stage == "train" else None
        is_last = record.step == record.num_steps
        self._update(
            stage=record.stage, step=record.step, num_steps=record.num_steps, seconds_left=seconds_left, at_once=is_last
        )

    def add_samples(self, samples: Samples) -> None:
        for number, picture in enumerate(samples.pictures.values()):
            with self._writing(), write_atomically(sample_path(self.expert, samples.step, number), sync=False) as file:
                picture.save(file)
        self._update(prompts=tuple(samples.pictures), at_once=True)

    def add_saved(self, path: Path) -> None:
        """Take an expert that was saved on the way."""
        self._update(saved=(*self._state.saved, path.name), at_once=True)

    def end(self, state: Literal["finished", "stopped", "failed"], message: str = "") -> None:
        self._update(state=state, message=message, seconds_left=None, at_once=True)

    def discard(self) -> None:
        """Remove the record of a training that left nothing."""
        self._is_broken = True
        shutil.rmtree(run_folder(self.expert), ignore_errors=True)
        metrics_path(self.expert).unlink(missing_ok=True)

    # --- what watchers ask for ---

    def ask(self, request: str) -> None:
        """Ask the training for something; it follows after the step that it is at.

        Raises:
            InputError: it cannot do that.
        """
        if request not in self.takes:
            raise InputError(f"this training cannot be asked to {request}" if request in ALL_REQUESTS else "no request")
        with self._lock:
            self._requests.add(request)

    def is_stopped(self) -> bool:
        """Say whether somebody asked to stop."""
        return STOP in self._requests

    def take_requests(self) -> set[str]:
        """Return what was asked since the last call, but stopping, which is for good."""
        with self._lock:
            taken = self._requests - {STOP}
            self._requests -= taken
        return taken

    @property
    def waiting(self) -> list[str]:
        """What was asked and not followed yet."""
        return sorted(self._requests)

    # ---

    def _update(self, *, at_once: bool = False, **changes: Any) -> None:
        seconds = round(time.monotonic() - self._begin, 1)
        self._state = self._state.model_copy(update={**changes, "seconds": seconds})
        if not at_once and time.monotonic() < self._next_write:
            return
        self._next_write = time.monotonic() + _INTERVAL_SECONDS
        self._state = self._state.model_copy(update={"memory": self._memory() or self._state.memory})
        with self._writing(), write_atomically(run_folder(self.expert) / "run.json", sync=False) as temporary:
            temporary.write_text(self._state.model_dump_json(), encoding="utf-8")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetyExpertsError) as error:
            if not self._is_broken:
                _log.warning("the training goes on, but its record for the run page does not: %s", error)
            self._is_broken = True


@contextlib.contextmanager
def recorded(recorder: RunRecorder) -> Iterator[None]:
    """Inside is the training; where it fails, its record says so, or goes away if nothing else is left of it."""
    try:
        yield
    except BaseException as error:
        if recorder.expert.exists() or resume_path(recorder.expert).exists():
            recorder.end("stopped" if isinstance(error, TrainingStoppedError) else "failed", printable(str(error), 500))
        else:
            recorder.discard()
        raise
