"""The merge methods by name; nodes, command line and docs are made from this table."""

from .concatenation import merge_linear
from .method import LayerTask, MergedLayer, MergeMethod, Parameter, Part
from .row_selection import merge_rows

METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(
        title="Weighted sum",
        paper_url="https://arxiv.org/abs/2212.04089",
        summary="Adds the experts up, each with its weight. Ranks add up; one dial a category stays.",
        merge_layer=merge_linear,
    ),
    "co-merge": MergeMethod(
        title="Co-Merge by row",
        paper_url="https://arxiv.org/abs/2412.10493",
        summary="Takes each output row from the expert that is most often the most active there. Ranks add up; "
        "one dial a category stays. Our reading of the paper's figure; its code is not published.",
        merge_layer=merge_rows,
        needs_statistics=True,
    ),
}

__all__ = ["METHODS", "LayerTask", "MergeMethod", "MergedLayer", "Parameter", "Part"]
