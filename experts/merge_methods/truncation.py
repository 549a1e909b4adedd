"""The truncation that every inexact method ends in, and its two parameters."""

from torch import Tensor

from ..truncation import Truncated, truncate_dense, truncate_factors
from .method import LayerTask, MergedLayer, Parameter

TRUNCATION = (
    Parameter("rank", 0, "Largest rank of a layer; 0 is the sum of the experts' ranks.", minimum=0),
    Parameter(
        "energy",
        1.0,
        "Keep the fewest ranks that hold this fraction of a layer's squared size.",
        minimum=0.0,
        maximum=1.0,
    ),
)


def finish_factors(task: LayerTask, up: Tensor, down: Tensor) -> MergedLayer:
    """Return up [out, R] @ down [R, in] at the task's rank and energy."""
    return _finish(task, truncate_factors(up, down, *_limits(task)))


def finish_dense(task: LayerTask, delta: Tensor) -> MergedLayer:
    """Return a dense ΔW [out, in·kh·kw] at the task's rank and energy."""
    return _finish(task, truncate_dense(delta, *_limits(task)))


def _limits(task: LayerTask) -> tuple[int, float]:
    return task.parameters["rank"] or sum(part.layer.rank for part in task.parts), task.parameters["energy"]


def _finish(task: LayerTask, truncated: Truncated | None) -> MergedLayer:
    if truncated is None:
        return MergedLayer(None)
    layer = task.make_layer(truncated.up, truncated.down)
    return MergedLayer(layer, retained_energy=truncated.retained_energy)
