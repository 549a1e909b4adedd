"""The node that encodes a prompt without the words that carry an unsafe concept: SAFREE, for SD1's text encoder."""

import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..errors import InputError
from ..experts.concept_gate import Gate
from ..guards.concepts import ALLOWED, Concept, parse_concepts
from ..guards.safree import SHARE, Edited, published, repaired
from . import sampling, sockets
from .checks import first_problem
from .sampling import Condition

PUBLISHED, REPAIRED = "published", "repaired"
_END, _NO_WORD = 49407, 0


class SafetyExpertsSafeTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsSafeTextEncode",
            display_name="Safe Text Encode",
            category="safety experts/guards",
            description="Encodes a prompt without the words that carry an unsafe concept (SAFREE); for SD1.x only.",
            search_aliases=["SAFREE", "safe prompt", "concept projection", "CLIP text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of an SD1.x model."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="", tooltip="The prompt."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    placeholder="violence: a scene with blood | a scene",
                    tooltip="One concept a line: `category: unsafe text | safe text`; several short texts a category.",
                ),
                io.Combo.Input(
                    "version",
                    options=[REPAIRED, PUBLISHED],
                    default=REPAIRED,
                    tooltip="repaired: with a gate, and of the whole prompt from the first such word on. published: as "
                    "in the paper, which finds some word in every prompt.",
                ),
                io.Float.Input(
                    "share",
                    default=SHARE,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Of repaired: words count that carry at least this part of what the one that carries most "
                    "does.",
                ),
                sockets.ConceptGate.Input(
                    "gate",
                    optional=True,
                    tooltip="Says which prompts ask for a concept; others stay. Needed by repaired.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="The prompt encoded; for KSampler."),
                io.String.Output("report", tooltip="Which words were found to carry a concept."),
            ],
        )

    @classmethod
    def validate_inputs(cls, concepts: str | None = None) -> bool | str:
        return first_problem((parse_concepts, concepts))

    @classmethod
    def execute(
        cls, clip, text: str, concepts: str, version: str, share: float, gate: Gate | None = None
    ) -> io.NodeOutput:
        named = [concept for concept in parse_concepts(concepts) if concept.category != ALLOWED]
        if not named:
            raise InputError("nothing to take out: write a concept")
        if version == REPAIRED and gate is None:
            raise InputError(
                "repaired needs to be told which prompts ask for a concept; connect a Concept Gate to gate"
            )
        own = sampling.encode_prompt(clip, text)
        tokens = clip.tokenize(text)
        if set(tokens) != {"l"} or len(own) != 1:
            raise InputError(
                "Safe Text Encode is for SD1.x, whose one text encoder is CLIP-L; use Pair Guard elsewhere"
            )
        if gate is not None and not gate.opened(own[0][0]).any():
            return io.NodeOutput(own, "the gate is closed; nothing was changed")
        states = _States(clip)
        parts = [states.edited(section, named, version, share) for section in tokens["l"]]  # of 77 tokens each
        words = [word for part, section in zip(parts, tokens["l"], strict=True) for word in states.words(part, section)]
        if not words:
            return io.NodeOutput(own, "no word carries a concept; nothing was changed")
        report = f"{len(words)} words carry a concept: {', '.join(words)}"
        changed = torch.cat([part.states for part in parts])[None].to(own[0][0])
        until = max(part.until for part in parts)
        if until < 1:
            report += f"; changed in the first {until:.0%} of the steps"
        return io.NodeOutput(_for_a_part(changed, own, until), report)


class _States:
    """The states of a CLIP-L, of prompts of 77 tokens."""

    def __init__(self, clip):
        self._clip = clip

    def edited(self, section: list, named: list[Concept], version: str, share: float) -> Edited:
        num_words = _end_of(section) - 1
        left_out = [[_without(entry) if at == word else entry for at, entry in enumerate(section)]
                    for word in range(1, num_words + 1)]  # fmt: skip
        texts = [self._clip.tokenize(text)["l"][0] for c in named for text in (c.unsafe[0], c.safe[0])]
        sections = [section, self._clip.tokenize("")["l"][0], *texts, *left_out]
        states = self._encoded(sections)
        if not num_words:
            return Edited(states[0], ())
        ends = torch.stack([rows[_end_of(each)] for rows, each in zip(states, sections, strict=True)])
        of_texts, without_word = ends[2 : 2 + len(texts)], ends[2 + len(texts) :]
        concepts, twins = of_texts[::2], of_texts[1::2]
        if version == PUBLISHED:
            return published(states[0], without_word, concepts)
        return repaired(states[0], states[1], ends[0], without_word, concepts, twins, share)

    def _encoded(self, sections: list[list]) -> Tensor:
        """Return [n, 77, d]; ComfyUI joins what it encodes together along the tokens."""
        joined = self._clip.encode_from_tokens({"l": sections})
        return joined.reshape(len(sections), -1, joined.shape[-1]).float().cpu()

    def words(self, part: Edited, section: list) -> list[str]:
        spelled = self._clip.tokenizer.untokenize([section[word + 1] for word in part.words])
        return [str(text).removesuffix("</w>") for _, text in spelled]


def _end_of(section: list) -> int:
    """Return where the first end token is."""
    return next(at for at, entry in enumerate(section) if isinstance(entry[0], int) and entry[0] == _END)


def _without(entry: tuple) -> tuple:
    return (_NO_WORD, *entry[1:])


def _for_a_part(changed: Tensor, own: Condition, until: float) -> Condition:
    """Return the changed states for the first part of the sampling, and the prompt's own for the rest."""
    edited = [[changed, dict(own[0][1])]]
    if until >= 1:
        return edited
    return node_helpers.conditioning_set_values(
        edited, {"start_percent": 0.0, "end_percent": until}
    ) + node_helpers.conditioning_set_values(own, {"start_percent": until, "end_percent": 1.0})
