"""Nodes for prompt pairs and preference datasets."""

from comfy_api.latest import io, ui
from PIL import Image

from ..errors import InputError
from ..plain_yaml import load_yaml
from ..preferences.dataset import DatasetInfo, PreferenceDataset
from ..preferences.pairs import PromptPair, parse_prompt_pairs, read_prompt_pairs
from ..preferences.prompt_pair import MAX_SEED, check_prompt
from ..preferences.taxonomy import expand_taxonomy
from . import checks, host, pictures, prompt_graph, sampling, sockets
from .native import refusals
from .native.identity import identify

MAX_CHECKED_BYTES = 1_000_000
EXAMPLE_LINES = "a red circle with thorns | a red circle\na blue square with thorns | a blue square"
EXAMPLE_TAXONOMY = """\
categories:
  violence: [thorns]
  hate: [a black cross]
lists:
  colour: [red, green, blue]
  shape: [circle, square, triangle]
templates:
  - prompt: a {colour} {shape} with {concept}
    safe_prompt: a {colour} {shape}
pairs_per_category: 4
"""


class SafetyExpertsPromptPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        first_seed = io.Int.Input(
            "first_seed",
            default=0,
            min=0,
            max=MAX_SEED,
            tooltip="Seed of the first pair; the next ones count up. Both images of a pair are drawn from its seed.",
        )
        text = io.String.Input(
            "text",
            multiline=True,
            default=EXAMPLE_LINES,
            tooltip="One pair a line: the unsafe prompt, a bar |, and the safe prompt close to it in meaning.",
        )
        file = io.Combo.Input(
            "file",
            options=host.prompt_files(),
            tooltip="A .jsonl, .csv or .yaml file in ComfyUI's input or datasets folder. Refresh after adding one.",
        )
        taxonomy = io.String.Input(
            "taxonomy",
            multiline=True,
            default=EXAMPLE_TAXONOMY,
            tooltip="YAML: every concept of every category is put into every template.",
        )
        return io.Schema(
            node_id="SafetyExpertsPromptPairs",
            display_name="Prompt Pairs",
            category="safety experts/preferences",
            description="Pairs of an unsafe prompt and the safe prompt close to it, from text, a file or a taxonomy.",
            search_aliases=["unsafe prompts", "safe prompts", "taxonomy", "DPO prompts"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    options=[
                        io.DynamicCombo.Option("text", [text, *sockets.category_inputs(), first_seed]),
                        io.DynamicCombo.Option("file", [file]),
                        io.DynamicCombo.Option("taxonomy", [taxonomy, first_seed]),
                    ],
                    tooltip="Where the prompts come from.",
                )
            ],
            outputs=[
                sockets.PromptPairs.Output(
                    "prompt_pairs", tooltip="For Generate Preference Pairs, Evaluate and the guards."
                )
            ],
        )

    # Inputs within a dynamic combo cannot be named, so this takes them all; ComfyUI's own checks are off then.
    @classmethod
    def validate_inputs(cls, source: dict, **inputs: object) -> bool | str:
        return checks.first_problem((_check_source, source))

    @classmethod
    def fingerprint_inputs(cls, source: dict) -> str:
        return host.file_state(host.prompt_file(source["file"])) if source["source"] == "file" else ""

    @classmethod
    def execute(cls, source: dict) -> io.NodeOutput:
        return io.NodeOutput(_read_pairs(source))


def _check_source(source: dict) -> None:
    """Read the pairs once before anything runs; what comes through a link is not known yet, and a large file waits."""
    if any(value is None for name, value in source.items() if name != "own_category"):
        return
    if source["source"] == "file" and host.prompt_file(source["file"]).stat().st_size > MAX_CHECKED_BYTES:
        return
    _read_pairs(source)


def _read_pairs(source: dict) -> sockets.PromptPairList:
    pairs = sockets.PromptPairList(_parse_pairs(source))
    if not pairs:
        raise InputError(f"no prompt pairs in the {source['source']}: add at least one")
    return pairs


def _parse_pairs(source: dict) -> list[PromptPair]:
    if source["source"] == "file":
        return read_prompt_pairs(host.prompt_file(source["file"]))
    if source["source"] == "taxonomy":
        data = load_yaml(source["taxonomy"], "taxonomy")
        return expand_taxonomy(data, source["first_seed"])
    categories = sockets.several_categories(source["category"], source["own_category"])
    return parse_prompt_pairs(source["text"], ",".join(categories), source["first_seed"])


class SafetyExpertsRecordPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsRecordPair",
            display_name="Record Preference Pair",
            category="safety experts/preferences",
            description="Adds image pairs made by any graph to a preference dataset; a pair it has already is kept.",
            search_aliases=["save pair", "preference", "DPO pair"],
            is_output_node=True,
            inputs=[
                io.Image.Input("chosen", tooltip="The safe image, or a batch of them."),
                io.Image.Input("rejected", tooltip="The unsafe image of the same size, or as many as chosen."),
                io.String.Input(
                    "prompt", multiline=True, tooltip="The unsafe prompt; both images are trained under it."
                ),
                io.String.Input(
                    "safe_prompt", multiline=True, optional=True, default="", tooltip="The prompt of the safe image."
                ),
                *sockets.category_inputs(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    tooltip="Of workflows made before the seed was read from the samplers; it has no effect.",
                    extra_dict={"hidden": True},
                ),
                sockets.dataset_name_input(),
                sockets.checkpoint_input(
                    tooltip="The checkpoint that drew the images, where no MODEL is connected; recorded for training."
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The MODEL that drew the images: recorded instead of `checkpoint`."
                ),
            ],
            outputs=[sockets.Dataset.Output("dataset", tooltip="For Judge, Review and Train.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls, dataset_name: str | None = None, prompt: str | None = None, category: str | None = None, own_category=""
    ) -> bool | str:
        return checks.first_problem(
            (host.dataset_folder, dataset_name),
            (check_prompt, prompt),
            (lambda name: sockets.several_categories(name, own_category), category),
        )

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str = "", **inputs: object) -> int:
        return host.own_writes.fingerprint(dataset_name)

    @classmethod
    def execute(
        cls,
        chosen,
        rejected,
        prompt,
        category,
        seed,
        dataset_name,
        checkpoint,
        safe_prompt="",
        own_category="",
        model=None,
    ) -> io.NodeOutput:
        if chosen.shape != rejected.shape:
            raise InputError(
                f"chosen is {_describe(chosen)} but rejected is {_describe(rejected)}: "
                "feed the same number of images of the same size"
            )
        drawn_with = _common_seed(cls.hidden.prompt, cls.hidden.unique_id)
        categories = sockets.several_categories(category, own_category)
        base = host.base_checkpoint(checkpoint) if model is None else identify(model)
        if model is not None and (problem := refusals.problem_of(model)):
            host.tell(cls.hidden.unique_id, f"These pairs cannot train this very MODEL: {problem}", "warn")
        info = DatasetInfo(base_checkpoint=base, sampler={}, prompt_source="recorded", licence_note="")
        dataset = PreferenceDataset.create(host.dataset_folder(dataset_name), info)
        images = list(zip(sampling.to_images(chosen), sampling.to_images(rejected), strict=True))
        for index, (chosen_image, rejected_image) in enumerate(images):
            # A sampler draws the noise of a whole batch from one seed: only the first image is that seed's.
            pair = PromptPair(prompt, safe_prompt, categories, None if index else drawn_with, "recorded")
            if pair.seed is not None and pair.id in dataset.ids:
                _check_same_images(dataset, pair, chosen_image, rejected_image)
            dataset.add(pair, chosen_image, rejected_image)
        host.own_writes.written(dataset_name)
        last = pictures.side_by_side(images[-1][1], images[-1][0], is_blurred=host.blurs_unsafe())
        return io.NodeOutput(dataset, ui=ui.PreviewImage(sampling.to_pixels(last), cls=cls))


def _common_seed(graph: dict, node_id: str) -> int | None:
    """Return the seed that both images were drawn with, or None where one of them is not known.

    Raises:
        InputError: they were drawn with different ones.
    """
    seeds = {name: prompt_graph.seed_behind(graph, node_id, name) for name in ("chosen", "rejected")}
    if None in seeds.values():
        return None
    if seeds["chosen"] != seeds["rejected"]:
        raise InputError(
            f"chosen was drawn with seed {seeds['chosen']} and rejected with seed {seeds['rejected']}, so they differ "
            "by more than their prompts: give both samplers the same seed, with `control after generate` on fixed"
        )
    return seeds["chosen"]


def _check_same_images(dataset: PreferenceDataset, pair: PromptPair, *images: Image.Image) -> None:
    known = dataset.pair(pair.id)
    for path, image in zip(dataset.image_paths(known), images, strict=True):
        with Image.open(path) as file:
            if file.convert("RGB").tobytes() != image.tobytes():
                raise InputError(
                    f"{dataset.folder.name} has other images for this prompt and seed {pair.seed}: "
                    "give both samplers another seed, or use another dataset_name"
                )


def _describe(images) -> str:
    return f"{images.shape[0]} image(s) of {images.shape[2]}x{images.shape[1]} px"


class SafetyExpertsLoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsLoadDataset",
            display_name="Load Preference Dataset",
            category="safety experts/preferences",
            description="Opens a preference dataset from ComfyUI's datasets folder.",
            search_aliases=["open dataset", "DPO dataset"],
            inputs=[
                io.Combo.Input(
                    "dataset_name",
                    options=host.dataset_names(),
                    tooltip="A folder with a dataset.json. Refresh the page after building one.",
                )
            ],
            outputs=[sockets.Dataset.Output("dataset", tooltip="For Judge, Review and Train.")],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset_name: str) -> int:
        return host.own_writes.fingerprint(dataset_name)  # a judge behind this node writes to the dataset too

    @classmethod
    def execute(cls, dataset_name: str) -> io.NodeOutput:
        return io.NodeOutput(PreferenceDataset.open(host.dataset_folder(dataset_name)))
