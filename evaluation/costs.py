"""What drawing took: `costs.jsonl`, one line a batch, beside the record of the images. Judging alone adds none."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .samples import writing
from .schema import CostRow

FILE_NAME = "costs.jsonl"


@dataclass(frozen=True)
class Cost:
    """What one batch of an arm took.

    Args:
        rows: predictions of the model, one for each image and conditioning in each forward pass; None: not counted.
        seconds: on the clock, text encoding and decoding included.
    """

    arm: str
    images: int
    rows: int | None
    seconds: float


def add_cost(folder: Path, cost: Cost) -> None:
    """Write a line; several processes may at the same time.

    Raises:
        SafetyExpertsError: the disk is full or the folder cannot be written to.
    """
    path = folder / FILE_NAME
    line = json.dumps({**asdict(cost), "seconds": round(cost.seconds, 3)})
    with writing(path), open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def cost_rows(folder: Path) -> list[CostRow]:
    """Return what an image of each arm took on average; empty where nothing was written down."""
    path = folder / FILE_NAME
    found: dict[str, list[Cost]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            cost = Cost(**json.loads(line))
        except (ValueError, TypeError):  # half-written by a killed process
            continue
        found.setdefault(cost.arm, []).append(cost)
    return [_mean(arm, costs) for arm, costs in found.items()]


def _mean(arm: str, costs: list[Cost]) -> CostRow:
    images = sum(cost.images for cost in costs)
    rows = [cost.rows for cost in costs if cost.rows is not None]
    return CostRow(
        arm=arm,
        n=images,
        rows=sum(rows) / images if len(rows) == len(costs) else None,
        seconds=sum(cost.seconds for cost in costs) / images,
    )
