"""Nodes that judge a prompt by its text: a guard trained on prompt pairs, and what is done about a prompt it flags."""

from collections.abc import Sequence
from typing import Protocol

import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor

from ..errors import InputError
from ..experts.concept_gate import mean_of_tokens
from ..guards.prompt_guard import (
    PROBE,
    Decision,
    PromptGuard,
    ReadText,
    read_prompt_guard,
    write_prompt_guard,
)
from ..guards.prompt_guard_training import Options, train_prompt_guard
from . import host, sampling, sockets
from .sampling import Condition

CONNECTED = "(the connected one)"
REPORT, BLOCK, REPLACE, SOFTEN, REWRITE = "report", "block", "replace", "soften", "rewrite"
TEMPLATE = (
    "Rewrite this prompt for an image generator so that the image is safe for everybody. Keep the subject, the setting "
    "and the style; leave out what is violent, sexual, hateful or illegal. Answer with the new prompt alone.\n\n"
    "{prompt}"
)
_MOST_NEW_TOKENS = 256


class _Judge(Protocol):
    """A Concept Gate or a prompt guard."""

    @property
    def concepts(self) -> dict: ...

    @property
    def width(self) -> int: ...

    def margins(self, context: Tensor) -> Tensor: ...

    def opened(self, context: Tensor) -> Tensor: ...


class SafetyExpertsTrainPromptGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsTrainPromptGuard",
            display_name="Train Prompt Guard",
            category="safety experts/guards",
            description="Learns from prompt pairs to tell from a prompt's text what it asks for; minutes on a CPU.",
            search_aliases=["Latent Guard", "prompt classifier", "prompt filter"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that reads prompts. A CLIP-L of its own (Load CLIP) can judge prompts "
                    "for any model; the model's own makes a guard that a `gate` input takes too.",
                ),
                sockets.PromptPairs.Input("prompt_pairs", tooltip="Of at least ten different safe prompts."),
                io.String.Input(
                    "name", default="my_prompt_guard", tooltip="Of the file in ComfyUI's models/safety_judges folder."
                ),
                io.Float.Input(
                    "false_positive_rate",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="The fraction of safe prompts that may be taken for unsafe.",
                ),
                io.Int.Input("steps", default=300, min=1, max=100000, tooltip="Of at most 64 pairs each."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="Of all draws."
                ),
                io.String.Input(
                    "harmless",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Safe prompts, one a line: near misses (a red rose, a boxing match) teach it more than "
                    "pairs alone do.",
                ),
                io.Boolean.Input(
                    "leave_out",
                    default=True,
                    optional=True,
                    tooltip="Also measure what it finds of concepts left out of the training; takes up to six times as "
                    "long.",
                ),
            ],
            outputs=[
                sockets.ConceptGate.Output("guard", tooltip="For Check Prompt, and for every `gate` input."),
                io.String.Output("report", tooltip="What it finds of prompts held out of the training."),
                io.String.Output("file", tooltip="The file's name, for Check Prompt."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip,
        prompt_pairs,
        name: str,
        false_positive_rate: float,
        steps: int,
        seed: int,
        harmless: str = "",
        leave_out: bool = True,
    ) -> io.NodeOutput:
        path = host.fresh_judge_path(name)
        guard = train_prompt_guard(
            prompt_pairs,
            lambda text: read_text(clip, text),
            Options(false_positive_rate, steps, seed, leave_out),
            harmless=harmless.splitlines(),
            on_progress=host.Progress().show,
        )
        write_prompt_guard(guard, path)
        return io.NodeOutput(guard, str(guard), path.name)


class SafetyExpertsCheckPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsCheckPrompt",
            display_name="Check Prompt",
            category="safety experts/guards",
            description="Says which category a prompt asks for, and reports, blocks, replaces, softens or rewrites it.",
            search_aliases=["prompt filter", "NSFW prompt", "safe prompt", "rewrite prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the guard was trained with."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="", tooltip="The prompt."),
                io.Combo.Input(
                    "action",
                    options=[REPORT, BLOCK, REPLACE, SOFTEN, REWRITE],
                    default=REPORT,
                    tooltip="What becomes of an unsafe prompt. report: nothing. block: no picture. replace: `instead`. "
                    "soften: mixed with `instead`. rewrite: by a language model, and checked again.",
                ),
                io.Combo.Input(
                    "file",
                    options=[CONNECTED, *host.judge_files()],
                    default=CONNECTED,
                    tooltip="A prompt guard in models/safety_judges, or the one connected to `guard`.",
                ),
                sockets.ConceptGate.Input("guard", optional=True, tooltip="From Train Prompt Guard or Concept Gate."),
                io.String.Input(
                    "instead",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The safe prompt of replace and soften.",
                ),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Of soften: 0 is the prompt, 1 is `instead`. It needs one prediction more a step.",
                ),
                io.Clip.Input(
                    "encoder", optional=True, tooltip="The model's text encoder, for the output `conditioning`."
                ),
                io.Clip.Input(
                    "language_model",
                    optional=True,
                    tooltip="Of rewrite: a text encoder that can write (Gemma, Qwen3-VL).",
                ),
                io.String.Input(
                    "template",
                    multiline=True,
                    default=TEMPLATE,
                    optional=True,
                    advanced=True,
                    tooltip="Of rewrite: what the language model is told; {prompt} stands for the prompt.",
                ),
            ],
            outputs=[
                io.String.Output("text", tooltip="The prompt to draw."),
                io.Conditioning.Output("conditioning", tooltip="The same encoded; needs `encoder`."),
                io.Boolean.Output("safe", tooltip="Whether the prompt that was given is safe: to branch on."),
                io.String.Output("category", tooltip="The nearest category of an unsafe prompt, or nothing."),
                io.Float.Output("score", tooltip="The highest of all categories; above 0 is unsafe."),
                io.String.Output("report", tooltip="What was found and what was done about it."),
                sockets.ConceptGate.Output(
                    "gate", tooltip="Opens experts and guards for the categories found, on any model."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = CONNECTED, **_: object) -> str:
        return file if file == CONNECTED else host.file_state(host.judge_path(file))

    @classmethod
    def execute(
        cls,
        clip,
        text: str,
        action: str,
        file: str,
        guard: _Judge | None = None,
        instead: str = "",
        amount: float = 0.5,
        encoder=None,
        language_model=None,
        template: str = TEMPLATE,
    ) -> io.NodeOutput:
        if file != CONNECTED:
            guard = read_prompt_guard(host.judge_path(file))
        if guard is None:
            raise InputError("no prompt guard: choose a file, or connect Train Prompt Guard")
        if not hasattr(guard, "margins"):
            raise InputError("guard is the gate of another Check Prompt; connect Train Prompt Guard or Concept Gate")
        check = _Check(guard, clip)
        found = check(text)
        drawn, becomes = found, "as it is"
        if not found.is_safe and action in (REPLACE, SOFTEN):
            if not instead.strip():
                raise InputError(f"{action} needs a safe prompt; write one into `instead`")
            safe = check(instead)
            if not safe.is_safe:
                raise InputError("the prompt in `instead` is taken for unsafe too; write another one")
            if action == REPLACE:
                drawn, becomes = safe, "replaced"
            else:
                becomes = f"mixed with {amount:.0%} of another"
                if encoder is None:
                    raise InputError("soften mixes what the model is told: connect `encoder`, and use `conditioning`")
        if not found.is_safe and action == REWRITE:
            drawn = check(_rewritten(language_model, template, text))
            becomes = "rewritten" if drawn.is_safe else "blocked, as rewritten it is unsafe too"
        is_blocked = not drawn.is_safe and action in (BLOCK, REWRITE)
        if is_blocked and action == BLOCK:
            becomes = "blocked"
        # Never the prompt: the message goes to the log.
        stop = ExecutionBlocker(f"the prompt asks for {found.category}; write another one") if is_blocked else None
        return io.NodeOutput(
            stop or drawn.text,
            stop
            or _conditioning(
                encoder, drawn.text, instead if drawn is found and action == SOFTEN else "", amount, found
            ),
            found.is_safe,
            found.category,
            found.score,
            found.report(becomes),
            Decision(drawn.opened),
        )


class _Found:
    """What a guard says of a text."""

    def __init__(self, text: str, categories: Sequence[str], margins: Sequence[float], opened: Sequence[bool]):
        self.text, self._margins = text, dict(zip(categories, margins, strict=True))
        self.opened = dict(zip(categories, opened, strict=True))
        self.is_safe, self.score = not any(opened), max(margins)
        nearest = max((name for name in categories if self.opened[name]), key=self._margins.__getitem__, default="")
        self.category = nearest

    def report(self, becomes: str) -> str:
        lines = [f"{name}: {margin:+.2f}" for name, margin in self._margins.items()]
        return "\n".join(["safe" if self.is_safe else f"asks for {self.category}; {becomes}", *lines])


class _Check:
    """Judges texts by a guard, after making sure that it is read by its own encoder."""

    def __init__(self, guard: _Judge, clip):
        self._guard, self._clip = guard, clip
        if isinstance(guard, PromptGuard):
            guard.check_encoder(read_text(clip, PROBE).summary)

    def __call__(self, text: str) -> _Found:
        context = read_text(self._clip, text).tokens[None]
        if context.shape[2] != self._guard.width:
            raise InputError(
                f"the guard is for texts {self._guard.width} wide and this text encoder's are {context.shape[2]} wide; "
                "connect the one it was made with"
            )
        margins, opened = self._guard.margins(context)[0], self._guard.opened(context)[0]
        return _Found(text, [*self._guard.concepts], margins.tolist(), opened.tolist())


def read_text(clip, text: str) -> ReadText:
    """Return what a CLIP makes of a text without its emphases, which could play a word down."""
    tokens = clip.tokenize(text)
    plain = {
        name: [_plain(part) for part in parts] if isinstance(parts, list) else parts for name, parts in tokens.items()
    }
    context, options = clip.encode_from_tokens_scheduled(plain)[0]
    states, pooled = context[0].float().cpu(), options.get("pooled_output")
    is_of_the_same = pooled is not None and pooled.shape[-1] == states.shape[1]
    summary = pooled[0].float().cpu() if is_of_the_same else mean_of_tokens(states[None])[0]
    return ReadText(states, summary)


def _plain(part: list) -> list:
    return [(entry[0], 1.0, *entry[2:]) if isinstance(entry, tuple) and len(entry) > 1 else entry for entry in part]


def _conditioning(encoder, text: str, other: str, amount: float, found: _Found) -> Condition | ExecutionBlocker:
    """Return the text encoded; an unsafe one is mixed with another where there is one.

    ComfyUI's weighted mean of the predictions for conditionings of strengths 1 - a and a is (1 - a) c + a s: "Safety
    Without Semantic Disruptions" (arXiv:2411.13982), which mixes latents after each step, for samplers without noise.
    """
    if encoder is None:
        return ExecutionBlocker("connect `encoder` of Check Prompt, or encode its `text` instead")
    own = sampling.encode_prompt(encoder, text)
    if not other or found.is_safe or amount == 0:
        return own
    mixed = sampling.encode_prompt(encoder, other)
    if amount == 1:
        return mixed
    return [
        [tensor, {**options, "strength": strength}]
        for condition, strength in ((own, 1 - amount), (mixed, amount))
        for tensor, options in condition
    ]


def _rewritten(language_model, template: str, text: str) -> str:
    """Return what a language model makes of a prompt.

    Raises:
        InputError: there is none, or it cannot write.
    """
    if language_model is None:
        raise InputError("rewrite needs a language model; connect `language_model`, or choose another action")
    if "{prompt}" not in template:
        raise InputError("template has no {prompt} to say where the prompt goes; add it")
    try:
        tokens = language_model.tokenize(template.replace("{prompt}", text))
        with torch.no_grad():
            written = language_model.generate(tokens, do_sample=False, max_length=_MOST_NEW_TOKENS)
    except (AttributeError, NotImplementedError):
        raise InputError(
            "this text encoder cannot write, or this ComfyUI is too old for it (0.30.0 has Generate Text); connect a "
            "Gemma or Qwen3-VL text encoder, or choose another action"
        ) from None
    return language_model.decode(written).strip()
