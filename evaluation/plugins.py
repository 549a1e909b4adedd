"""Scorers of one's own, by path: LPIPS, PickScore, HPSv2, an aesthetic head, whatever a Python file computes.

The file defines `score(images, prompts, base_images)`: lists of RGB pictures and texts, `base_images[i]` being the base
model's picture of the same prompt and seed (None for the base itself); it returns a dict of numbers for each picture.
Only the command line takes such a file, since it is run; a workflow cannot name one.
"""

import dataclasses
import hashlib
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, SafetyExpertsError
from .plan import BASE, read_prompts
from .samples import FILE_NAME, SampleStore, read_picture, read_samples

_BATCH = 16
_LABEL = re.compile(r"[\w.@-]+")

Score = Callable[[list[Image.Image], list[str], list[Image.Image | None]], list[dict[str, float]]]


@dataclass(frozen=True)
class Plugin:
    """A scorer from a file; `version` is the file's hash."""

    name: str
    version: str
    score: Score


def load_plugin(spec: str) -> Plugin:
    """Run a file and return its scorer.

    Args:
        spec: `FILE.py`, or `NAME=FILE.py`.

    Raises:
        InputError: no such file, or it does not define `score`.
    """
    name, separator, rest = spec.partition("=")
    path = Path(rest if separator else spec)
    name = name if separator else path.stem
    if not _LABEL.fullmatch(name) or path.suffix != ".py":
        raise InputError(f"--scorer {spec}: write NAME=FILE.py, the name of letters, digits, and . @ - _ only")
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a Python file that defines score(images, prompts, base_images)")
    found = importlib.util.spec_from_file_location(f"safety_experts_scorer_{path.stem}", path)
    assert found and found.loader  # of every .py file
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: cannot be run ({_first_line(error)}); correct it") from error
    score: Any = getattr(module, "score", None)
    if not callable(score):
        raise InputError(f"{path}: defines no score(images, prompts, base_images); add it")
    return Plugin(name, hashlib.sha256(path.read_bytes()).hexdigest()[:16], score)


def measure_with(
    folder: Path,
    plugin: Plugin,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Add `NAME/…` to every sample; False when it was stopped, with what was measured kept.

    Raises:
        InputError: the folder holds no evaluation, or a picture is missing or broken.
        SafetyExpertsError: the scorer failed, or gave something else than numbers.
    """
    samples, prompts, store = read_samples(folder / FILE_NAME), read_prompts(folder), SampleStore(folder)
    base = {sample.pair_key: sample for sample in samples if sample.arm == BASE}
    for start in range(0, len(samples), _BATCH):
        if should_stop():
            return False
        batch = samples[start : start + _BATCH]
        images = [read_picture(folder, sample) for sample in batch]
        texts = [str(prompts.get((sample.suite, sample.prompt_id), {}).get("text", "")) for sample in batch]
        bases = [
            read_picture(folder, base[sample.pair_key]) if sample.arm != BASE and sample.pair_key in base else None
            for sample in batch
        ]
        found = _checked(plugin, _scores_of(plugin, images, texts, bases), len(batch))
        store.append(
            dataclasses.replace(sample, metrics=sample.metrics | values)
            for sample, values in zip(batch, found, strict=True)
        )
        on_progress(start + len(batch), len(samples))
    return True


def _scores_of(plugin: Plugin, images, texts, bases) -> Any:
    try:
        return plugin.score(images, texts, bases)
    except Exception as error:
        raise SafetyExpertsError(f"scorer {plugin.name} failed: {_first_line(error)}") from error


def _checked(plugin: Plugin, found: Any, count: int) -> list[dict[str, float]]:
    """Return the scores under their names; nothing that is no finite number passes."""
    try:
        rows = [{f"{plugin.name}/{key}": float(value) for key, value in row.items()} for row in found]
    except (TypeError, ValueError, AttributeError) as error:
        raise SafetyExpertsError(f"scorer {plugin.name}: gives no dict of numbers for each picture") from error
    names = {key for row in rows for key in row}
    if len(rows) != count or not all(_LABEL.fullmatch(name.partition("/")[2]) for name in names):
        raise SafetyExpertsError(f"scorer {plugin.name}: gives {len(rows)} dicts for {count} pictures, or odd names")
    if not all(math.isfinite(value) for row in rows for value in row.values()):
        raise SafetyExpertsError(f"scorer {plugin.name}: gives a number that is not finite")
    return rows


def _first_line(error: Exception) -> str:
    """Return what went wrong by its kind alone: a scorer's message may hold a prompt."""
    return type(error).__name__


def load_plugins(specs: Sequence[str]) -> list[Plugin]:
    """Return the scorers by path.

    Raises:
        InputError: a file is missing or wrong, or two have one name.
    """
    plugins = [load_plugin(spec) for spec in specs]
    names = [plugin.name for plugin in plugins]
    if repeated := [name for name in names if names.count(name) > 1 or name == "clip"]:
        raise InputError(f"scorer {repeated[0]!r} is a name that is taken; write another, NAME=FILE.py")
    return plugins
