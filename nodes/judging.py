"""Nodes that judge pictures: a judge as a value, and a dataset judged by several."""

import functools
import os
import typing
from pathlib import Path

import comfy.model_management
import torch
import yaml
from comfy_api.latest import io, ui

from ..errors import InputError
from ..evaluation.judges import JUDGES, JudgeChoice, choose_judge
from ..evaluation.judges.clip_concepts import ClipConcepts, check_towers
from ..evaluation.judges.clip_encoder import shared_clip
from ..evaluation.judges.clip_heads import LaionHead, UnsafeHeads
from ..evaluation.judges.q16 import Q16
from ..evaluation.judges.q16_vectors import read_vectors
from ..evaluation.judges.verifier import load_verifier_judge
from ..evaluation.judging import JudgingStoppedError, judge_dataset
from ..plain_yaml import load_yaml
from . import host, sockets
from .comfy_clip import ComfyClip

MAX_JUDGES = 8
# A workflow comes from anybody: these are for the machine's owner to decide, not for the workflow.
_NOT_IN_A_WORKFLOW = {"allow_remote", "cache"}
ALLOW_REMOTE_VARIABLE = "SAFETY_EXPERTS_ALLOW_REMOTE"
_CLIPS = {
    "q16": ("clip_vision",),
    "unsafe-heads": ("clip_vision",),
    "laion-nsfw": ("clip_vision",),
    "clip-concepts": ("clip_vision", "clip"),
    "verifier": ("clip_vision",),
}


_CLIP_VISION_TOOLTIPS = {
    "q16": "Q16's published vectors need ViT-L/14 (OpenAI's).",
    "unsafe-heads": "ViT-L/14 (OpenAI's).",
    "laion-nsfw": "ViT-L/14 (OpenAI's).",
    "verifier": "The CLIP Vision that the verifier was trained with.",
    "clip-concepts": "Of the same CLIP as the text encoder.",
}


class SafetyExpertsJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsJudge",
            display_name="Safety Judge",
            category="safety experts/evaluation",
            description="A judge of pictures as a value: which one, its options, the rule that says what is unsafe.",
            search_aliases=["NSFW detector", "NudeNet", "Q16", "classifier", "CLIP", "VLM", "moderation"],
            inputs=[
                io.DynamicCombo.Input(
                    "judge",
                    options=[io.DynamicCombo.Option(name, _inputs(name)) for name in JUDGES],
                    tooltip="Which judge; the help page says what each needs and its licence.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="How scores and reports call it; needed to use two of a kind. Empty: the judge's own name.",
                ),
            ],
            outputs=[
                sockets.Judge.Output("judge", tooltip="For Judge Preference Dataset, Evaluate and Attack Safety.")
            ],
        )

    @classmethod
    def execute(cls, judge: dict, name: str = "") -> io.NodeOutput:
        return io.NodeOutput(_choose(judge, (name or "").strip() or None))


class SafetyExpertsJudgeDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        judges = io.Autogrow.TemplatePrefix(
            sockets.Judge.Input("judge", tooltip="From Safety Judge."), prefix="judge_", min=1, max=MAX_JUDGES
        )
        return io.Schema(
            node_id="SafetyExpertsJudgeDataset",
            display_name="Judge Preference Dataset",
            category="safety experts/preferences",
            description="Lets judges look at every picture of a dataset, writes their scores and flags into it, and "
            "leaves the pairs they doubt for review. Goes on where it was stopped.",
            search_aliases=["score pairs", "filter dataset", "check labels", "NSFW"],
            is_output_node=True,
            inputs=[
                sockets.Dataset.Input("dataset", tooltip="The pairs to judge; scores and flags are written into it."),
                io.Autogrow.Input(
                    "judges", template=judges, tooltip="Who looks at the pictures; a new socket appears for each."
                ),
            ],
            outputs=[
                sockets.Dataset.Output(
                    "judged_dataset", display_name="dataset", tooltip="The dataset with its scores."
                ),
                io.String.Output("summary", tooltip="Per category, how many pairs agree with their labels."),
                io.Int.Output("agreed", tooltip="Pairs the judges agree with."),
                io.Int.Output("doubtful", tooltip="Pairs left for review."),
            ],
        )

    @classmethod
    def execute(cls, dataset, judges: dict) -> io.NodeOutput:
        chosen = [judges[name] for name in sorted(judges, key=lambda name: int(name.rpartition("_")[2]))]
        progress = host.PatientProgress(1)
        try:
            summary = judge_dataset(
                dataset,
                chosen,
                device=str(comfy.model_management.get_torch_device()),
                on_progress=progress.show,
                should_stop=progress.is_cancelled,
            )
        except JudgingStoppedError:
            progress.raise_cancel()
            raise
        finally:
            if name := host.dataset_name(dataset.folder):
                host.own_writes.written(name)
        text = summary.to_text()
        return io.NodeOutput(dataset, text, summary.agreed, summary.doubtful, ui=ui.PreviewText(text))


def _inputs(kind_name: str) -> list[io.Input]:
    kind = JUDGES[kind_name]
    inputs: list[io.Input] = []
    for socket in _CLIPS.get(kind_name, ()):
        inputs.append(
            io.ClipVision.Input("clip_vision", tooltip=_CLIP_VISION_TOOLTIPS[kind_name])
            if socket == "clip_vision"
            else io.Clip.Input("clip", tooltip="The text encoder trained with this CLIP Vision, with its projection.")
        )
    for name, field in kind.options.model_fields.items():
        if name in _NOT_IN_A_WORKFLOW or (name == "folder" and kind_name in _CLIPS):
            continue
        inputs.append(_input(name, field))
    rules = " · ".join(f"{name}: {rule.summary}" for name, rule in kind.rules.items())
    return [*inputs, io.Combo.Input("rule", options=list(kind.rules), optional=True, tooltip=rules)]


def _input(name: str, field) -> io.Input:
    common = {"tooltip": field.description}
    limits = {}
    for item in field.metadata:
        for ours, theirs in (("min", "ge"), ("min", "gt"), ("max", "le")):
            if hasattr(item, theirs):
                limits[ours] = getattr(item, theirs)
    kinds = {field.annotation, *typing.get_args(field.annotation)}
    if Path in kinds:
        options = host.judge_folders() if name == "folder" else host.judge_files()
        return io.Combo.Input(name, options=options, **common)
    if field.annotation is float:
        return io.Float.Input(name, default=field.default, step=0.01, optional=True, **limits, **common)
    if field.annotation is int:
        return io.Int.Input(name, default=field.default, optional=True, **limits, **common)
    if typing.get_origin(field.annotation) is dict:
        text = yaml.safe_dump(field.get_default(call_default_factory=True), sort_keys=False, width=1000)
        return io.String.Input(name, multiline=True, default=text, optional=True, **common)
    default = field.default if isinstance(field.default, str) else ""
    return io.String.Input(name, default=default, optional=bool(default), **common)


def _choose(given: dict, name: str | None) -> JudgeChoice:
    """Return the choice a dynamic combo describes; its files stay in ComfyUI's folders."""
    kind_name = given["judge"]
    if kind_name not in JUDGES:
        raise InputError(f"no judge {kind_name!r}; choose from {', '.join(JUDGES)}")
    values = {}
    for option, field in JUDGES[kind_name].options.model_fields.items():
        value = given.get(option)
        if option in _NOT_IN_A_WORKFLOW or value is None or (option == "folder" and kind_name in _CLIPS):
            continue
        if Path in {field.annotation, *typing.get_args(field.annotation)}:
            value = host.judge_path(value)
        elif typing.get_origin(field.annotation) is dict:
            value = load_yaml(value, option) or {}
        values[option] = value
    if given.get("rule"):
        values["rule"] = given["rule"]
    if kind_name == "vlm":
        values["allow_remote"] = os.environ.get(ALLOW_REMOTE_VARIABLE) == "1"
    choice = choose_judge(kind_name, values, name)
    loader = functools.partial(_load, choice)
    if kind_name in _CLIPS:
        loader = functools.partial(_load_with_clip, choice, given["clip_vision"], given.get("clip"))
    return JudgeChoice(choice.name, kind_name, choice.kind, choice.options, choice.rule, loader)


def _load(choice: JudgeChoice, device: str):
    if folder := getattr(choice.options, "folder", None):
        # Its weights stay outside ComfyUI's books while it judges, so room is made for them, and as much to work in.
        num_bytes = 2 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        comfy.model_management.free_memory(num_bytes, torch.device(device))
    return choice.kind.load(choice.options, device)


def _load_with_clip(choice: JudgeChoice, clip_vision, clip, device: str):
    key = "comfyui", id(clip_vision), id(clip)  # alive as long as the shared one is
    encoder = shared_clip(key, lambda: ComfyClip(clip_vision, clip))
    if choice.kind_name == "q16":
        return Q16(encoder, read_vectors(choice.options.vectors))
    if choice.kind_name == "verifier":
        return load_verifier_judge(encoder, choice.options.file)
    if choice.kind_name == "unsafe-heads":
        return UnsafeHeads(encoder, choice.options.heads)
    if choice.kind_name == "laion-nsfw":
        return LaionHead(encoder, choice.options.head)
    check_towers(encoder)
    return ClipConcepts(encoder, choice.options)
