"""The node that puts a guard on a model: what acts against a category while an image is drawn, without training."""

import math
from collections.abc import Sequence

import torch
from comfy_api.latest import io
from torch import Tensor

from ..errors import InputError
from ..experts.concept_gate import Gate
from ..guards.concepts import ALLOWED, Concept, concepts_of_pairs, parse_concepts
from ..guards.guidance import SLD_PRESETS
from ..preferences.categories import CATEGORIES
from ..preferences.dataset import PreferenceDataset
from ..preferences.prompt_pair import PromptPair
from . import host, sampling, sockets
from .applied import applied_experts
from .checks import first_problem
from .guarding import Guard, GuardConcept, Method, add_guard
from .sampling import Condition

OTHER = "other"
METHODS = ("pair", "sld", "casg")
PRESENCE, TEXT, BOTH, ALWAYS = "presence", "gate", "gate and presence", "always"


class SafetyExpertsPairGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def percent(name: str, default: float, tooltip: str) -> io.Input:
            return io.Float.Input(
                name, default=default, tooltip=tooltip, min=0.0, max=1.0, step=0.01, optional=True, advanced=True
            )

        def strength(name: str, tooltip: str) -> io.Input:
            return io.Float.Input(name, default=1.0, min=0.0, max=4.0, step=0.05, tooltip=tooltip)

        return io.Schema(
            node_id="SafetyExpertsPairGuard",
            display_name="Pair Guard",
            category="safety experts/guards",
            description=(
                "Steers a model away from unsafe concepts while it draws, from prompt pairs or a few words; needs no "
                "training, and leaves pictures without the concept as they are."
            ),
            search_aliases=["safety guidance", "SLD", "CASG", "negative guidance", "inference guard"],
            inputs=[
                io.Model.Input("model", tooltip="The model to guard; it stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder that the prompts will be encoded with."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    placeholder="violence: a scene with blood | a scene",
                    tooltip="One concept a line: `category: unsafe text | safe text`, the same text with and without "
                    "what is unsafe. Several lines may name one category; `allowed` in its place is for what only "
                    "resembles it. Leave empty to use only prompt pairs.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="pair",
                    tooltip="pair: along unsafe minus safe twin, at any CFG. sld: Safe Latent Diffusion. casg: the "
                    "same, only against the category that answers most.",
                ),
                io.Combo.Input(
                    "opens",
                    options=[PRESENCE, TEXT, BOTH, ALWAYS],
                    default=PRESENCE,
                    tooltip="When the guard acts: where the model's own first predictions show the concept, where the "
                    "gate says that the prompt asks for it, where both do, or always.",
                ),
                *[strength(_input_id(name), f"Strength against {name}: 0 is off.") for name in CATEGORIES],
                strength(OTHER, "Strength against categories of your own."),
                io.MultiType.Input(
                    "pairs",
                    [sockets.PromptPairs, sockets.Dataset],
                    optional=True,
                    tooltip="Prompt pairs, or a dataset's; each category is one concept more.",
                ),
                sockets.ConceptGate.Input(
                    "gate", optional=True, tooltip="For `opens`: which prompts ask for which category."
                ),
                io.Boolean.Input(
                    "skip_covered",
                    default=True,
                    optional=True,
                    tooltip="Leave out categories that an expert on the model covers: against a full expert a guard "
                    "adds cost and noise.",
                ),
                io.Combo.Input(
                    "sld_preset",
                    options=list(SLD_PRESETS),
                    default="strong",
                    optional=True,
                    advanced=True,
                    tooltip="For sld and casg; tuned by their authors on SD1 with a CFG of 7.5.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Presence above which the guard acts: 0.5 is a picture of the concept, -0.5 its safe twin.",
                ),
                percent("deciding_part", 0.33, "The part of the steps that decides whether the concept is there."),
                percent("start_percent", 0.0, "From this part of the sampling on (0 is the beginning)."),
                percent("end_percent", 1.0, "Up to this part of the sampling (1 is the end)."),
                io.Int.Input(
                    "num_pairs",
                    default=50,
                    min=1,
                    max=10000,
                    optional=True,
                    advanced=True,
                    tooltip="At most so many pairs a category are averaged, drawn at random.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the guard on it; for KSampler."),
                io.String.Output("report", tooltip="What is guarded against, and what it costs."),
            ],
        )

    @classmethod
    def validate_inputs(cls, concepts: str | None = None) -> bool | str:
        return first_problem((parse_concepts, concepts))

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concepts: str,
        method: Method,
        opens: str,
        pairs: Sequence[PromptPair] | PreferenceDataset | None = None,
        gate: Gate | None = None,
        skip_covered: bool = True,
        sld_preset: str = "strong",
        threshold: float = 0.4,
        deciding_part: float = 0.33,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        num_pairs: int = 50,
        **strengths: float,
    ) -> io.NodeOutput:
        if opens in (TEXT, BOTH) and gate is None:
            raise InputError(
                f"opens is {opens!r} and nothing is connected to gate; connect a Concept Gate, a prompt guard or the "
                "gate of Check Prompt"
            )
        named = parse_concepts(concepts)
        if pairs is not None:
            given = pairs.training_pairs() if isinstance(pairs, PreferenceDataset) else pairs
            named += concepts_of_pairs(given, num_pairs)
        if not any(concept.category != ALLOWED for concept in named):
            raise InputError("nothing to guard against: write a concept, or connect prompt pairs")
        if method != "pair" and any(concept.category == ALLOWED for concept in named):
            raise InputError(f"`{ALLOWED}` lines are for the method pair; take them out, or choose it")
        encoder = _Encoder(clip, len({text for concept in named for text in (*concept.unsafe, *concept.safe)}))

        def strength_of(concept: Concept) -> float:
            return strengths[_input_id(concept.category) if concept.category in CATEGORIES else OTHER]

        found = [
            GuardConcept(
                (c.category,), strength_of(c), encoder.mean(c.unsafe), encoder.mean(c.safe), c.category == ALLOWED
            )
            for c in named
        ]
        if method != "pair":
            empty = encoder.mean(("",))
            found = [GuardConcept(c.categories, c.strength, c.unsafe, empty) for c in found]
        if method == "sld":
            found = _joined([c for c in found if c.strength])
        guard = Guard(
            method,
            found,
            SLD_PRESETS[sld_preset],
            _TextGate(gate, found) if gate is not None and opens in (TEXT, BOTH) else None,
            -math.inf if opens in (TEXT, ALWAYS) else threshold,
            deciding_part,
            start_percent,
            end_percent,
            skip_covered,
        )
        return io.NodeOutput(add_guard(model, guard), _report(guard, named, opens, model))


class _Encoder:
    """Encodes prompts once each, with the node's progress bar."""

    def __init__(self, clip, num_prompts: int):
        self._clip, self._progress = clip, host.Progress(num_prompts)
        self._encoded: dict[str, Condition] = {}
        self._means: dict[tuple[str, ...], Condition] = {}

    def _encode(self, prompt: str) -> Condition:
        if prompt not in self._encoded:
            self._encoded[prompt] = sampling.encode_prompt(self._clip, prompt)
            self._progress.advance(1)
        return self._encoded[prompt]

    def mean(self, prompts: tuple[str, ...]) -> Condition:
        """Return the mean of the prompts' conditionings; the same object for the same prompts."""
        key = tuple(sorted(set(prompts)))
        if key not in self._means:
            self._means[key] = mean_condition([self._encode(prompt) for prompt in key])
        return self._means[key]


def mean_condition(conditions: Sequence[Condition]) -> Condition:
    """Return the mean of what several prompts are encoded to, pooled outputs included.

    Raises:
        InputError: they differ in length, as prompts of more than one window of tokens do.
    """
    if len(conditions) == 1:
        return conditions[0]
    if any(len(c) != 1 for c in conditions) or len({c[0][0].shape for c in conditions}) > 1:
        raise InputError("the prompts of a category differ in length once encoded; write a short pair of texts instead")
    tensors = [condition[0][0] for condition in conditions]
    options = dict(conditions[0][0][1])
    for name, value in options.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            options[name] = torch.stack([condition[0][1][name] for condition in conditions]).mean(dim=0)
    return [[torch.stack(tensors).mean(dim=0), options]]


def _joined(concepts: Sequence[GuardConcept]) -> list[GuardConcept]:
    """Return one concept of all, as Safe Latent Diffusion has it: the mean of their conditionings and strengths."""
    if not concepts:
        return []
    categories = tuple(dict.fromkeys(name for concept in concepts for name in concept.categories))
    strength = sum(concept.strength for concept in concepts) / len(concepts)
    unsafe = mean_condition([concept.unsafe for concept in concepts])
    return [GuardConcept(categories, strength, unsafe, concepts[0].safe)]


class _TextGate:
    """Says by a gate which of a guard's concepts a conditioning asks for; those it does not know always may act."""

    def __init__(self, gate: Gate, concepts: Sequence[GuardConcept]):
        self._gate, self._concepts = gate, concepts
        known = {name for concept in concepts for name in concept.categories} & set(gate.concepts)
        if not known:
            names = ", ".join(gate.concepts)
            raise InputError(f"the gate knows none of the guard's categories, only {names}; make one for them")

    def __call__(self, context: Tensor) -> Tensor:
        if self._gate.width not in (None, context.shape[2]):
            raise InputError(
                f"the gate is for {self._gate.width} wide conditionings and the prompt's is {context.shape[2]} wide; "
                "make the gate with the text encoder of the prompt"
            )
        opened = dict(zip(self._gate.concepts, self._gate.opened(context).T, strict=True))
        always = torch.ones(len(context), dtype=torch.bool, device=context.device)
        columns = [
            torch.stack([opened.get(name, always) for name in concept.categories]).any(dim=0)
            for concept in self._concepts
        ]
        return torch.stack(columns, dim=1)


def _report(guard: Guard, named: Sequence[Concept], opens: str, model) -> str:
    covered = {name for applied in applied_experts(model) for name in applied.covered} if guard.skips_covered else set()
    lines = []
    for concept in named:
        counted = "two texts" if len(concept.unsafe) == 1 else f"the means of {len(concept.unsafe)} prompt pairs"
        is_covered = " left out, an expert on the model covers it" if concept.category in covered else ""
        lines.append(f"{concept.category}: {counted}{is_covered}")
    acting = [c for c in guard.concepts if (c.strength or c.is_allowed) and not set(c.categories) <= covered]
    rows = len({id(condition) for concept in acting for condition in (concept.unsafe, concept.safe)})
    until = "in every step" if opens in (TEXT, ALWAYS) else f"in the first {guard.deciding_part:.0%} of the steps"
    after = ", then two while open and none while closed" if guard.method == "pair" and opens == PRESENCE else ""
    lines.append(f"{guard.method}, opened by {opens}: {rows} predictions more {until}{after}")
    return "\n".join(lines)


def _input_id(category: str) -> str:
    return category.replace("-", "_")
