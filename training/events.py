"""What a training tells the outside while it runs, and what it asks: one object that callers fill in."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .metrics import Metrics, MetricsSink
from .samples import Samples

SAMPLE, SAVE = "sample", "save"  # what may be asked for in between


@dataclass(frozen=True)
class StepRecord:
    """One sign of life: `step` of `num_steps` of a stage is done; metrics come with the "train" stage."""

    stage: str  # "images" | "prompts" | "train"
    step: int
    num_steps: int
    metrics: dict[str, float] = field(default_factory=dict)


def _ignore(_: object) -> None:
    pass


def _never() -> bool:
    return False


def _nothing() -> Collection[str]:
    return ()


@dataclass(frozen=True)
class TrainingEvents:
    """All but `should_stop` are called in the main process only.

    Args:
        on_resume: takes the metrics of the steps before a resumption, once, before the first step; not called without.
        on_step: called after every encoded group and every optimizer step.
        on_samples: takes pictures drawn before the first step and every `sample_every` steps.
        on_saved: takes the file of an expert that was saved on the way, because `take_requests` asked for it.
        should_stop: asked before every forward pass; True saves what there is and ends the run.
        take_requests: asked after every step, returns what to do now: SAMPLE, SAVE.
        sinks: files and services that the metrics of every step go to, also those of the steps before a resumption.
        sample_every: 0 draws no samples.
    """

    on_resume: Callable[[Sequence[Metrics]], None] = _ignore
    on_step: Callable[[StepRecord], None] = _ignore
    on_samples: Callable[[Samples], None] = _ignore
    on_saved: Callable[[Path], None] = _ignore
    should_stop: Callable[[], bool] = _never
    take_requests: Callable[[], Collection[str]] = _nothing
    sinks: Sequence[MetricsSink] = ()
    sample_every: int = 0
