"""What lies beside an expert in `output/loras`: the state of a stopped training, and the metrics of every step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...files import write_atomically


def earlier_experts(path: Path) -> list[Path]:
    """Return the experts that were written under the name of a fresh one, the newest first."""
    return _earlier(path, ".safetensors")


def stopped_training(path: Path) -> Path | None:
    """Return the newest state that a training of this name left when it was stopped."""
    return next(iter(_earlier(path, ".resume")), None)


def _earlier(path: Path, suffix: str) -> list[Path]:
    prefix = path.name.rsplit("_", 2)[0] + "_"
    found = [
        (int(number), other)
        for other in path.parent.glob(f"*{suffix}")
        if other.name.startswith(prefix)
        and (number := other.name.removeprefix(prefix).removesuffix(suffix).removesuffix("_")).isdigit()
    ]
    return [other for _, other in sorted(found, reverse=True)]


def write_metrics(path: Path, records: Sequence[Mapping[str, float]]) -> None:
    """Keep the metrics of every step beside an expert, one JSON object a line."""
    with write_atomically(path.with_suffix(".metrics.jsonl")) as temporary:
        temporary.write_text("".join(json.dumps(dict(record)) + "\n" for record in records), encoding="utf-8")


def read_losses(path: Path) -> list[float] | None:
    """Return the loss of every step of the training that made an expert; None where it is not kept."""
    try:
        lines = path.with_suffix(".metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [float(json.loads(line)["loss"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return None
