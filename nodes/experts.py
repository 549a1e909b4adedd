"""Nodes for expert files: load, merge, save."""

import re
from dataclasses import replace

import comfy.model_management
from comfy_api.latest import io

from ..errors import InputError
from ..experts.co_merge import ActivationCounter
from ..experts.expert import Expert
from ..experts.expert_file import load_expert, save_expert
from ..experts.fused import in_one_spelling
from ..experts.merging import METHODS, merge_experts
from ..training.recipe import load_recipe
from ..training.strengths import fit_strengths
from . import base_models, calibration, checks, host, sockets

MAX_EXPERTS = 16


class SafetyExpertsLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsLoad",
            display_name="Load Safety Expert",
            category="safety experts/experts",
            description="Reads an expert, or any other LoRA, from ComfyUI's loras folders.",
            search_aliases=["open expert", "load LoRA"],
            inputs=[
                io.MultiType.Input(
                    io.Combo.Input(
                        "expert_name",
                        options=host.expert_names(),
                        tooltip="Refresh the page after training a new one; or link the name that training gives.",
                    ),
                    types=[io.String],
                )
            ],
            outputs=[sockets.Expert.Output("expert", tooltip="For Apply, Merge or Save Safety Expert.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, expert_name: str | None = None) -> bool | str:
        return checks.first_problem((host.expert_path, expert_name))

    @classmethod
    def fingerprint_inputs(cls, expert_name: str | None = None) -> str:
        return host.file_state(host.expert_path(expert_name)) if expert_name else ""

    @classmethod
    def execute(cls, expert_name: str) -> io.NodeOutput:
        expert = load_expert(host.expert_path(expert_name))
        text = _in_words(expert)
        host.show_text(cls.hidden.unique_id, text)
        if (trained := expert.info.trained) and not trained.finished:
            host.tell(cls.hidden.unique_id, f"{expert_name}: {text}", "warn")
        return io.NodeOutput(expert)


def _in_words(expert: Expert) -> str:
    """Return what an expert is for, and of which step of its training it is."""
    words = [", ".join(expert.categories) or "no category"]
    if trained := expert.info.trained:
        steps = trained.recipe.get("steps")
        words.append(f"step {trained.step}" + (f" of {steps}" if isinstance(steps, int) else ""))
        if not trained.finished:
            words.append("unfinished: its training was stopped")
    return ", ".join(words)


class SafetyExpertsMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        experts = io.Autogrow.TemplatePrefix(
            sockets.Expert.Input("expert", tooltip="From Load or Train Safety Expert."),
            prefix="expert_",
            min=1,
            max=MAX_EXPERTS,
        )
        return io.Schema(
            node_id="SafetyExpertsMerge",
            display_name="Merge Safety Experts",
            category="safety experts/experts",
            description="Merges any number of experts of one model family into one LoRA.",
            search_aliases=["Co-Merge", "merge LoRA", "combine experts"],
            inputs=[
                io.Autogrow.Input(
                    "experts", template=experts, tooltip="The experts to merge; a new socket appears for each."
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option(name, _method_inputs(name)) for name in METHODS],
                    tooltip="How to merge; the help page explains each method.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="One number an expert, such as 1, 0.5; empty means 1 for each.",
                ),
            ],
            outputs=[sockets.Expert.Output("expert", tooltip="For Apply, Merge or Save Safety Expert.")],
        )

    @classmethod
    def validate_inputs(cls, weights: str | None = None, experts: object = None, method: object = None) -> bool | str:
        return checks.first_problem((_parse_weights, weights))

    @classmethod
    def execute(cls, experts: dict, method: dict, weights: str = "") -> io.NodeOutput:
        in_order = [experts[name] for name in sorted(experts, key=lambda name: int(name.rpartition("_")[2]))]
        name = method["method"]
        counts = None
        if METHODS[name].needs_counts and len(in_order) > 1:
            counts = _calibrate(in_one_spelling(in_order), method)
        given = _parse_weights(weights)
        if METHODS[name].needs_weights and given is None:
            given = _fit(in_order, method)
        merged = merge_experts(
            in_order,
            name,
            weights=given,
            parameters=_given_parameters(method),
            activation_counts=counts,
            device=comfy.model_management.get_torch_device(),
            on_layer=host.Progress().show,
        )
        return io.NodeOutput(merged)


def _method_inputs(name: str) -> list[io.Input]:
    method = METHODS[name]
    inputs: list[io.Input] = []
    if method.needs_counts:
        inputs += [
            io.Model.Input("model", tooltip="The model the experts were trained on, without any of them."),
            io.Clip.Input("clip", tooltip="The model's text encoder."),
            sockets.PromptPairs.Input("prompt_pairs", tooltip="Of all categories; their unsafe prompts are sampled."),
            io.Int.Input("num_prompts", default=32, min=1, max=10000, tooltip="At most so many, drawn at random."),
            io.Int.Input("calibration_steps", default=10, min=1, max=1000, tooltip="Sampling steps for each prompt."),
            io.Int.Input("width", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
            io.Int.Input("height", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
        ]
    if method.needs_weights:
        inputs += [
            sockets.Dataset.Input("dataset", tooltip="Pairs of all categories, to fit the strengths on."),
            sockets.checkpoint_input(base_models.OF_DATASET, tooltip="The model the experts were trained on."),
            sockets.Recipe.Input(
                "recipe", optional=True, tooltip="How to fit; empty means the recipe named strengths."
            ),
        ]
    for item in method.parameters:
        # Optional, so that saved workflows still run when a method gets a new parameter.
        common = {"default": item.default, "tooltip": item.tooltip, "optional": True}
        if item.choices:
            inputs.append(io.Combo.Input(item.name, options=list(item.choices), **common))
        else:
            widget = io.Int if isinstance(item.default, int) else io.Float
            inputs.append(widget.Input(item.name, min=item.minimum, max=item.maximum, **common))
    return inputs


def _calibrate(experts, method: dict):
    counter = ActivationCounter(experts)
    calibration.count_activations(
        counter,
        method["model"],
        method["clip"],
        method["prompt_pairs"],
        num_prompts=method["num_prompts"],
        steps=method["calibration_steps"],
        width_px=method["width"],
        height_px=method["height"],
    )
    return counter.counts


def _fit(experts, method: dict) -> list[float]:
    recipe = method.get("recipe") or load_recipe("strengths")
    progress = host.PatientProgress(recipe.steps)
    with host.training_on_device() as device:
        strengths = fit_strengths(
            experts,
            host.open_checkpoint(base_models.find(method["checkpoint"], method["dataset"])),
            method["dataset"],
            recipe,
            device=device,
            on_step=progress.show,
            should_stop=progress.is_cancelled,
        )
    progress.raise_cancel()
    return strengths


def _given_parameters(method: dict) -> dict:
    names = [item.name for item in METHODS[method["method"]].parameters]
    return {name: method[name] for name in names if method[name] is not None}  # None: left out of the request


def _parse_weights(text: str) -> list[float] | None:
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    try:
        return [float(part) for part in parts] or None
    except ValueError:
        raise InputError("weights: give one number an expert with commas between, such as 1, 0.5") from None


class SafetyExpertsSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsSave",
            display_name="Save Safety Expert",
            category="safety experts/experts",
            description="Writes an expert to output/loras, where every LoRA loader finds it.",
            search_aliases=["export expert", "save LoRA"],
            is_output_node=True,
            inputs=[
                sockets.Expert.Input("expert", tooltip="From Train or Merge Safety Expert."),
                io.String.Input(
                    "expert_name", default="my_expert", tooltip="File name in output/loras; a counter is added."
                ),
            ],
            outputs=[io.String.Output("expert_name", tooltip="The file's name in the loras folders.")],
        )

    @classmethod
    def validate_inputs(cls, expert_name: str | None = None) -> bool | str:
        return checks.first_problem((host.fresh_expert_path, expert_name))

    @classmethod
    def execute(cls, expert, expert_name: str) -> io.NodeOutput:
        path = host.fresh_expert_path(expert_name)
        save_expert(replace(expert, name=path.stem), path)
        return io.NodeOutput(host.expert_name(path))
