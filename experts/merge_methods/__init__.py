"""The merge methods by name; nodes, command line and docs are made from this table."""

from .concatenation import merge_average, merge_linear, merge_task_arithmetic
from .method import LayerTask, MergedLayer, MergeMethod, Parameter, Part
from .selection import merge_by_activation, merge_by_weight
from .singular import merge_knots, merge_svd, merge_tsv
from .sparsification import (
    merge_breadcrumbs,
    merge_dare,
    merge_dare_ties,
    merge_della,
    merge_magnitude_prune,
    merge_ties,
)
from .sphere import merge_karcher, merge_slerp
from .truncation import TRUNCATION

_SCALE = Parameter("scale", 1.0, "Multiplies the merged change.", minimum=-10.0, maximum=10.0)
_SEED = Parameter("seed", 0, "Seed of the random dropping.", minimum=0, maximum=2**32 - 1)


def _density(default: float) -> Parameter:
    return Parameter("density", default, "Fraction of each expert's weights that stays.", minimum=0.001, maximum=1.0)


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(
        title="Weighted sum",
        paper_url="https://arxiv.org/abs/2212.04089",
        summary="Adds the experts up, each with its weight. Ranks add up; one dial a category stays.",
        merge_layer=merge_linear,
    ),
    "average": MergeMethod(
        title="Average",
        paper_url="https://arxiv.org/abs/2203.05482",
        summary="The sum divided by the number of experts. Ranks add up; one dial a category stays.",
        merge_layer=merge_average,
    ),
    "task-arithmetic": MergeMethod(
        title="Task arithmetic",
        paper_url="https://arxiv.org/abs/2212.04089",
        summary="The sum times one scale. Ranks add up; one dial a category stays.",
        merge_layer=merge_task_arithmetic,
        parameters=(_SCALE,),
    ),
    "fitted": MergeMethod(
        title="Fitted sum",
        paper_url="https://arxiv.org/abs/2310.02575",
        summary="Adds the experts up, each as strongly as pairs of a dataset ask for: one strength each is trained "
        "by the preference loss with the anchor on safe prompts. Our own; the paper learns merge coefficients too, by "
        "another loss. Ranks add up; one dial a category stays.",
        merge_layer=merge_linear,
        needs_weights=True,
    ),
    "co-merge": MergeMethod(
        title="Co-Merge",
        paper_url="https://arxiv.org/abs/2412.10493",
        summary="Takes each output row (or layer) from the expert that is most often the most active there. Ranks add "
        "up; one dial a category stays. Our reading of the paper's figure; its code is not published.",
        merge_layer=merge_by_activation,
        needs_statistics=True,
        parameters=(
            Parameter("granularity", "row", "What comes from one expert as a whole.", choices=("row", "layer")),
        ),
    ),
    "co-merge-weights": MergeMethod(
        title="Co-Merge without data",
        paper_url="https://arxiv.org/abs/2412.10493",
        summary="Co-Merge by the size of weights instead of activations: not the paper's method, a fallback that needs "
        "no prompts. Granularity weight is dense and truncated; factor suits experts trained from one seed.",
        merge_layer=merge_by_weight,
        is_exact=False,
        parameters=(
            Parameter(
                "granularity",
                "row",
                "What comes from one expert as a whole.",
                choices=("row", "layer", "factor", "weight"),
            ),
            *TRUNCATION,
        ),
    ),
    "svd": MergeMethod(
        title="Truncated sum",
        paper_url="https://doi.org/10.1007/BF02288367",
        summary="The best approximation of the weighted sum at a smaller rank.",
        merge_layer=merge_svd,
        is_exact=False,
        parameters=TRUNCATION,
    ),
    "ties": MergeMethod(
        title="TIES",
        paper_url="https://arxiv.org/abs/2306.01708",
        summary="Keeps each expert's largest weights, elects a sign for each weight and averages those that agree.",
        merge_layer=merge_ties,
        is_exact=False,
        parameters=(_density(0.2), _SCALE, *TRUNCATION),
    ),
    "dare": MergeMethod(
        title="DARE",
        paper_url="https://arxiv.org/abs/2311.03099",
        summary="Drops weights at random, rescales the rest and adds the experts up.",
        merge_layer=merge_dare,
        is_exact=False,
        parameters=(_density(0.5), _SCALE, _SEED, *TRUNCATION),
    ),
    "dare-ties": MergeMethod(
        title="DARE with TIES",
        paper_url="https://arxiv.org/abs/2311.03099",
        summary="Drops weights at random, rescales the rest, then elects signs and averages those that agree.",
        merge_layer=merge_dare_ties,
        is_exact=False,
        parameters=(_density(0.5), _SCALE, _SEED, *TRUNCATION),
    ),
    "della": MergeMethod(
        title="DELLA",
        paper_url="https://arxiv.org/abs/2406.11617",
        summary="Drops small weights more often than large ones, rescales, then elects signs and averages.",
        merge_layer=merge_della,
        is_exact=False,
        parameters=(
            _density(0.5),
            Parameter("epsilon", 0.2, "Spread of the keep probability within a row.", minimum=0.0, maximum=1.0),
            _SCALE,
            _SEED,
            *TRUNCATION,
        ),
    ),
    "breadcrumbs": MergeMethod(
        title="Model Breadcrumbs",
        paper_url="https://arxiv.org/abs/2312.06795",
        summary="Drops the very largest and the small weights of each expert and adds the rest up.",
        merge_layer=merge_breadcrumbs,
        is_exact=False,
        parameters=(
            _density(0.5),
            Parameter("gamma", 0.01, "Fraction of the largest weights dropped.", minimum=0.0, maximum=1.0),
            _SCALE,
            *TRUNCATION,
        ),
    ),
    "magnitude-prune": MergeMethod(
        title="Magnitude pruning",
        paper_url="https://arxiv.org/abs/1506.02626",
        summary="Keeps the largest weights of each expert and adds them up.",
        merge_layer=merge_magnitude_prune,
        is_exact=False,
        parameters=(_density(0.2), _SCALE, *TRUNCATION),
    ),
    "slerp": MergeMethod(
        title="Spherical interpolation",
        paper_url="https://doi.org/10.1145/325334.325242",
        summary="Walks from the first of two experts to the second along the great circle, layer by layer.",
        merge_layer=merge_slerp,
        parameters=(Parameter("t", 0.5, "0 is the first expert, 1 the second.", minimum=0.0, maximum=1.0),),
    ),
    "karcher": MergeMethod(
        title="Karcher mean",
        paper_url="https://doi.org/10.1002/cpa.3160300502",
        summary="The direction with the least squared angle to all experts, at their mean size, layer by layer.",
        merge_layer=merge_karcher,
        parameters=(Parameter("max_iterations", 100, "Stops earlier when it stands still.", minimum=1, maximum=10000),),
    ),
    "knots": MergeMethod(
        title="KnOTS with TIES",
        paper_url="https://arxiv.org/abs/2410.19735",
        summary="Brings the experts into one space by a joint SVD and merges their right singular vectors by TIES.",
        merge_layer=merge_knots,
        is_exact=False,
        parameters=(_density(0.2), _SCALE, *TRUNCATION),
    ),
    "tsv": MergeMethod(
        title="Task singular vectors",
        paper_url="https://arxiv.org/abs/2412.00081",
        summary="Makes the experts' singular vectors orthonormal before adding them, so that they interfere less.",
        merge_layer=merge_tsv,
        is_exact=False,
        parameters=(
            Parameter(
                "keep_fraction",
                1.0,
                "Fraction of each expert's singular vectors that stays.",
                minimum=0.001,
                maximum=1.0,
            ),
            _SCALE,
            *TRUNCATION,
        ),
    ),
}

__all__ = ["METHODS", "LayerTask", "MergeMethod", "MergedLayer", "Parameter", "Part"]
