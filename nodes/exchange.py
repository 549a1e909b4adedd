"""Nodes that take in preference data of other formats, and part a dataset so that nothing leaks."""

from comfy_api.latest import io

from ..errors import InputError
from ..preferences.categories import canonical_categories
from ..preferences.dataset import PreferenceDataset
from ..preferences.formats import FORMATS
from ..preferences.importing import import_dataset
from ..preferences.near_duplicates import NEAR
from ..preferences.splitting import split_dataset, split_pairs
from . import checks, host, sockets

PARTS = ("train", "held-out")


class SafetyExpertsImportDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        layouts = "\n".join(f"{name}: {kind.layout}" for name, kind in FORMATS.items())
        return io.Schema(
            node_id="SafetyExpertsImportDataset",
            display_name="Import Preference Dataset",
            category="safety experts/preferences",
            description="Makes a preference dataset of pairs that other tools wrote; a stopped one goes on.",
            search_aliases=["Pick-a-Pic", "CoProV2", "TRL", "HPDv2", "kohya", "parquet"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("format", options=list(FORMATS), tooltip=f"What the source is.\n{layouts}"),
                io.String.Input(
                    "source",
                    default="input/…",
                    tooltip="The file or folder: input/… or datasets/…, in ComfyUI's folders of these names.",
                ),
                io.String.Input(
                    "images_folder",
                    default="",
                    optional=True,
                    tooltip="Where the images are that the source names, likewise; empty: beside it.",
                ),
                io.String.Input(
                    "own_category",
                    default="",
                    optional=True,
                    tooltip="Category of pairs whose format does not say it, or several with commas between.",
                ),
                sockets.dataset_name_input(),
            ],
            outputs=[sockets.Dataset.Output("dataset", tooltip="The imported pairs, in ComfyUI's datasets folder.")],
        )

    @classmethod
    def validate_inputs(
        cls, source: str | None = None, images_folder: str | None = None, dataset_name: str | None = None
    ) -> bool | str:
        return checks.first_problem(
            (host.import_source, source),
            (host.import_source, images_folder or None),
            (host.dataset_folder, dataset_name),
        )

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str = "", source: str = "", **inputs: object) -> str:
        try:
            state = host.file_state(host.import_source(source))
        except InputError:
            state = "absent"
        return f"{host.own_writes.fingerprint(dataset_name)} {state}"

    @classmethod
    def execute(cls, format, source, dataset_name, images_folder="", own_category="") -> io.NodeOutput:
        progress = host.Progress()
        made = import_dataset(
            format,
            host.import_source(source),
            host.dataset_folder(dataset_name),
            images_folder=host.import_source(images_folder) if images_folder else None,
            categories=canonical_categories(own_category or ""),
            on_progress=lambda done, _: progress.show(done, done + 1),
        )
        host.own_writes.written(dataset_name)
        left_out = "".join(f"\n{count} left out: {reason}" for reason, count in made.skipped.items())
        return io.NodeOutput(made.dataset, ui={"text": (f"{len(made.dataset.pairs)} pairs{left_out}",)})


class SafetyExpertsSplitDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsSplitDataset",
            display_name="Split Preference Dataset",
            category="safety experts/preferences",
            description="Parts a dataset into two between which nothing leaks: near prompts stay together.",
            search_aliases=["held-out", "test set", "train test split"],
            is_output_node=True,
            inputs=[
                sockets.Dataset.Input("dataset", tooltip="The dataset to split; its pictures stay where they are."),
                io.Float.Input(
                    "held_out_share", default=0.2, min=0.01, max=0.99, step=0.01, tooltip="Of all pairs, about."
                ),
                io.Float.Input(
                    "near",
                    default=NEAR,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="From this similarity of their words on two prompts are near; 1: only the same words.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Another seed draws other parts."),
                io.String.Input(
                    "dataset_name",
                    default="my_dataset_split",
                    tooltip="The parts are written as <name>/train and <name>/held-out in ComfyUI's datasets folder.",
                ),
            ],
            outputs=[
                sockets.Dataset.Output("train", tooltip="The pairs to train on."),
                sockets.Dataset.Output("held_out", tooltip="The pairs kept back, for an honest test."),
            ],
        )

    @classmethod
    def validate_inputs(cls, dataset_name: str | None = None) -> bool | str:
        return checks.first_problem((host.dataset_folder, dataset_name))

    @classmethod
    def execute(cls, dataset, held_out_share, near, seed, dataset_name) -> io.NodeOutput:
        dataset.refresh()
        parts = dict(zip(PARTS, (1 - held_out_share, held_out_share), strict=True))
        folders = [host.dataset_folder(f"{dataset_name}/{part}") for part in PARTS]
        if all((folder / "dataset.json").is_file() for folder in folders):
            # Queued again: the parts that are there must be those that would be written.
            wanted = split_pairs(dataset.pairs, parts, near=near, seed=seed)
            opened = [PreferenceDataset.open(folder) for folder in folders]
            for part, found in zip(PARTS, opened, strict=True):
                if list(found.ids) != [pair.id for pair in wanted[part]]:
                    raise InputError(f"{dataset_name} holds another split; choose another dataset_name, or delete it")
            return io.NodeOutput(*opened)
        counts = split_dataset(dataset, host.dataset_folder(dataset_name), parts, near=near, seed=seed)
        text = ", ".join(f"{name}: {count} pairs" for name, count in counts.items())
        return io.NodeOutput(*(PreferenceDataset.open(folder) for folder in folders), ui={"text": (text,)})
