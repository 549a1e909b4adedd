"""Looking at pairs: the review page in ComfyUI's server, and the node that opens it."""

from collections import Counter
from pathlib import Path
from typing import get_args

from comfy_api.latest import io

from ..preferences.records import Review
from ..preferences.reviewing.routes import add_review_routes
from . import host, sockets


class _Datasets:
    """ComfyUI's dataset folders, as the review page asks for them."""

    def names(self) -> list[str]:
        return host.dataset_names()

    def folder(self, name: str) -> Path:
        return host.dataset_folder(name)


def register_review_page() -> None:
    """Put the page into the running server; without one (a program that only imports the nodes) do nothing."""
    from server import PromptServer

    if server := getattr(PromptServer, "instance", None):
        add_review_routes(server.routes, _Datasets())


class SafetyExpertsReviewDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsReviewDataset",
            display_name="Review Preference Dataset",
            category="safety experts/preferences",
            description="Opens the page where pairs are looked at, and counts what is accepted, flipped and dropped.",
            search_aliases=["look at pairs", "label", "rate", "accept", "annotate"],
            is_output_node=True,
            inputs=[
                sockets.Dataset.Input("dataset", tooltip="The pairs to look at."),
                io.Boolean.Input(
                    "open_page",
                    default=True,
                    tooltip="When the node has run and pairs are left to review, open the page in the side bar.",
                ),
            ],
            outputs=[
                sockets.Dataset.Output(
                    "reviewed_dataset", display_name="dataset", tooltip="The dataset as it is reviewed by now."
                ),
                io.Int.Output("unreviewed", tooltip="Pairs nobody has decided yet."),
                io.Int.Output("accepted", tooltip="Pairs kept as they are."),
                io.Int.Output("flipped", tooltip="Pairs whose two pictures change places."),
                io.Int.Output("dropped", tooltip="Pairs left out of training."),
            ],
        )

    @classmethod
    def execute(cls, dataset, open_page) -> io.NodeOutput:
        dataset.refresh()
        counts = Counter(pair.review for pair in dataset.pairs)
        numbers = [counts[review] for review in (None, *get_args(Review))]
        shown = {
            "dataset": host.dataset_name(dataset.folder),
            "open_page": open_page and counts[None] > 0,
            "summary": f"{counts[None]} of {len(dataset.pairs)} left to review",
        }
        return io.NodeOutput(dataset, *numbers, ui={"safety_experts_review": [shown]})
