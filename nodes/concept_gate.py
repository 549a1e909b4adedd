"""The node that finds which conditionings each category's expert should act on."""

import random

from comfy_api.latest import io

from ..errors import InputError
from ..experts.concept_gate import fit_concept_gate, mean_of_tokens
from . import host, sampling, sockets


class SafetyExpertsConceptGate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsConceptGate",
            display_name="Concept Gate",
            category="safety experts/experts",
            description="Learns from prompt pairs which prompts each category's expert should act on.",
            search_aliases=["prompt gate", "concept direction"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the prompts will be encoded with."),
                sockets.PromptPairs.Input("prompt_pairs", tooltip="Of each category at least two different pairs."),
                io.Float.Input(
                    "false_positive_rate",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The fraction of the safe prompts that may open a gate.",
                ),
                io.Int.Input(
                    "num_pairs", default=100, min=2, max=10000, tooltip="At most so many a category, drawn at random."
                ),
            ],
            outputs=[
                sockets.ConceptGate.Output("gate", tooltip="For Apply Safety Expert."),
                io.String.Output("report", tooltip="How well each gate tells the prompts apart."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt_pairs, false_positive_rate: float, num_pairs: int) -> io.NodeOutput:
        by_category: dict[str, list] = {}
        for pair in random.Random(0).sample(prompt_pairs, len(prompt_pairs)):
            for category in pair.categories:
                if pair.safe_prompt.strip() and len(by_category.setdefault(category, [])) < num_pairs:
                    by_category[category].append(pair)
        if not any(by_category.values()):
            raise InputError("no prompt pair has a safe prompt and a category; give pairs with both")
        unsafe = {name: list(dict.fromkeys(pair.prompt for pair in pairs)) for name, pairs in by_category.items()}
        safe = {name: list(dict.fromkeys(pair.safe_prompt for pair in pairs)) for name, pairs in by_category.items()}
        prompts = dict.fromkeys(["", *(p for group in (unsafe, safe) for texts in group.values() for p in texts)])
        progress = host.Progress(len(prompts))
        encoded = {}
        for prompt in prompts:
            encoded[prompt] = mean_of_tokens(sampling.encode_prompt(clip, prompt)[0][0])[0].cpu()
            progress.advance(1)
        gate = fit_concept_gate(unsafe, safe, encoded, false_positive_rate)
        return io.NodeOutput(gate, str(gate))
