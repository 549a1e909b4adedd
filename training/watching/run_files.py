"""What a training leaves beside its expert for the run page: `<name>.metrics.jsonl` and the folder `<name>.run`.

<name>.metrics.jsonl            a line a step, appended while it trains
<name>.run/run.json             `RunState`, written once a second
<name>.run/samples/000010-0.png step and number of the prompt
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...errors import InputError
from ...files import open_plain, refuse_link
from ...typed import FileRecord, Text, parse_json, read_record

_PNG = b"\x89PNG\r\n\x1a\n"
_SAMPLE = re.compile(r"(\d{6,9})-(\d{1,3})\.png")
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_MAX_STATE_BYTES = 1 << 20
_MAX_METRICS_BYTES = 1 << 28


class Memory(FileRecord):
    """Memory of the training's device, in MiB.

    Args:
        peak: the most there has been; None where that is not known.
    """

    device: Text
    used: float
    peak: float | None = None


class RunState(FileRecord):
    """How far a training is.

    Args:
        stage: "images" and "prompts" are encoded first, then comes "train".
        started: UTC, ISO 8601.
        seconds: since then.
        seconds_left: None where it is not known yet, and after the end.
        prompts: of the samples, the unsafe one first.
        message: how it ended, in words.
        saved: experts saved on the way.
    """

    format_version: Literal[1] = 1
    state: Literal["running", "finished", "stopped", "failed"] = "running"
    stage: Literal["images", "prompts", "train"] = "images"
    step: _Count = 0
    num_steps: _Count = 0
    started: Text
    seconds: float = 0.0
    seconds_left: float | None = None
    memory: Memory | None = None
    recipe: Text = ""
    categories: tuple[Text, ...] = ()
    base: Text = ""
    dataset: Text = ""
    prompts: tuple[Text, ...] = ()
    message: Text = ""
    saved: tuple[Text, ...] = ()


def run_folder(expert: Path) -> Path:
    """Return where what is drawn during the training of an expert lies."""
    return expert.with_suffix(".run")


def metrics_path(expert: Path) -> Path:
    return expert.with_suffix(".metrics.jsonl")


def sample_path(expert: Path, step: int, number: int) -> Path:
    return run_folder(expert) / "samples" / f"{step:06}-{number}.png"


def read_state(expert: Path) -> RunState:
    """Read run.json.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = run_folder(expert) / "run.json"
    refuse_link(path.parent)
    try:
        with open_plain(path) as file:
            text = file.read(_MAX_STATE_BYTES)
    except OSError as error:
        raise InputError(f"{path.parent.name}: no training is recorded here ({error.strerror}); train anew") from None
    return read_record(RunState, parse_json(text, path.name), path.name)


def read_metrics(expert: Path, since: int = 0) -> list[dict[str, float | None]]:
    """Return the metrics of the steps after `since`; None for what is not finite. A torn last line is left out."""
    try:
        with open_plain(metrics_path(expert)) as file:
            lines = file.read(_MAX_METRICS_BYTES).decode(errors="replace").split("\n")[since:-1]
    except OSError:
        return []
    rows = []
    for line in lines:
        row = _row_of(line)
        if row is None:
            break  # what comes after a damaged line is of unknown steps
        rows.append(row)
    return rows


def _row_of(line: str) -> dict[str, float | None] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {name: _short(value) for name, value in numbers.items()}


def _short(value: float) -> float | None:
    """Return six digits of a number, as many as a chart can show; None where it is no number."""
    try:
        value = float(value)
    except OverflowError:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else None


def read_png(path: Path) -> bytes:
    """Return the bytes of a PNG picture, never through a link.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is no PNG picture.
    """
    if path.parent.name == "samples":
        refuse_link(path.parent)
        refuse_link(path.parent.parent)
    with open_plain(path) as file:
        data = file.read()
    if not data.startswith(_PNG):
        raise InputError(f"{path.name} is no PNG picture; remove it")
    return data


def sample_steps(expert: Path) -> list[tuple[int, int]]:
    """Return (step, number of pictures) of the samples on disk, first step first."""
    counts: dict[int, int] = {}
    folder = run_folder(expert) / "samples"
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if match := _SAMPLE.fullmatch(path.name):
                counts[int(match[1])] = counts.get(int(match[1]), 0) + 1
    return sorted(counts.items())


def describe_run(expert: Path, since: int = 0) -> dict[str, Any]:
    """Return JSON values: the state, the metrics after a step, and which samples there are."""
    state: Mapping[str, Any] = read_state(expert).model_dump(mode="json", exclude={"format_version"})
    return {**state, "since": since, "metrics": read_metrics(expert, since), "samples": sample_steps(expert)}
