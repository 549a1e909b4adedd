"""Telling from the text of a prompt which unsafe concept it asks for: Latent Guard (Liu et al., arXiv:2404.08031).

A prompt is the states of its tokens h [t, d] that a text encoder makes, a concept one vector c [d]. Each concept looks
at all tokens, in 16 heads of 32, and is compared with what it finds:

    v = F(softmax(Q(c) K(h)ᵀ / √32) V(h)),  score = cos(v, G(Q(c)))

A prompt is unsafe where a score is above the threshold; then the category of the nearest concept is open, and any other
whose score is above a threshold of its own, which few unsafe prompts of other categories reach.

The release puts the state of the end token in front of the others once more; here it is in its own place only, so that
a conditioning is all that is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..tensor_file import read_tensors, write_tensors

METADATA_KEY = "safety_experts_prompt_guard"
NUM_HEADS, HEAD_WIDTH, OUT_WIDTH = 16, 32, 128
_Rate = Annotated[float, pydantic.Field(ge=0, le=1)]
_Count = Annotated[int, pydantic.Field(ge=0)]
_Text = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
# Names in the published file, and ours.
_PUBLISHED = {
    "x1_to_key": "key",
    "x2_to_query": "query",
    "x1_to_value": "value",
    "final_mlp": "found",
    "mlp_query1": "wanted",
}


@dataclass(frozen=True)
class ReadText:
    """What a text encoder makes of a text.

    Attributes:
        tokens: states [t, d]; rows of zeros are padding.
        summary: of the whole text [d]: the end token's state, or where there is none the mean of the tokens.
    """

    tokens: Tensor = field(repr=False)
    summary: Tensor = field(repr=False)


class Matcher(nn.Module):
    """Compares prompts with concepts; `temperature` is of the training alone."""

    def __init__(self, width: int):
        super().__init__()
        inner = NUM_HEADS * HEAD_WIDTH
        self.key, self.query, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.found, self.wanted = nn.Linear(inner, OUT_WIDTH), nn.Linear(inner, OUT_WIDTH)
        self.temperature = nn.Parameter(torch.tensor(1 / 0.07))

    def forward(self, tokens: Tensor, concepts: Tensor) -> Tensor:
        """Return cosines [n, c] of prompts [n, t, d] and concepts [c, d]; a prompt of zeros alone is like none."""
        n, t, _ = tokens.shape
        is_there = (tokens != 0).any(dim=2)  # [n, t]
        queries = self.query(concepts)  # [c, 512]
        keys, values = (layer(tokens).reshape(n, t, NUM_HEADS, HEAD_WIDTH) for layer in (self.key, self.value))
        heads = queries.reshape(-1, NUM_HEADS, HEAD_WIDTH)
        logits = torch.einsum("nthe,che->nhct", keys, heads) / HEAD_WIDTH**0.5
        logits = logits.masked_fill(~is_there[:, None, None], torch.finfo(logits.dtype).min)
        looked_at = torch.einsum("nhct,nthe->nche", logits.softmax(dim=3), values).flatten(2)  # [n, c, 512]
        cosines = torch.cosine_similarity(self.found(looked_at), self.wanted(queries)[None], dim=2)
        return torch.where(is_there.any(dim=1)[:, None], cosines, torch.full_like(cosines, -1.0))


class ConceptFacts(pydantic.BaseModel):
    """A concept's text, and the categories that it is of."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    text: _Text = pydantic.Field(repr=False)
    categories: Annotated[tuple[_Text, ...], pydantic.Field(min_length=1, max_length=100)]


class CategoryFacts(pydantic.BaseModel):
    """How many unsafe prompts of a category opened it, of those held out of the training.

    Attributes:
        threshold: a cosine, above which the category is open beside the nearest.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    threshold: float
    recall: _Rate
    num_unsafe: _Count
    other_rate: _Rate
    num_other: _Count


class LeftOut(pydantic.BaseModel):
    """How many unsafe prompts were found whose concept was told to the guard only after its training."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recall: _Rate
    num_unsafe: _Count


class GuardFacts(pydantic.BaseModel):
    """What a prompt guard knows, and how well.

    Attributes:
        threshold: a cosine.
        false_positive_rate: of the safe prompts held out.
        left_out: None where it was not measured.
        tokens_per_part: of an encoder that reads long prompts in parts; each is judged alone. 0: as a whole.
        encoder: which one, for messages.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    concepts: Annotated[tuple[ConceptFacts, ...], pydantic.Field(min_length=1, max_length=100_000)]
    categories: dict[str, CategoryFacts]
    threshold: float
    false_positive_rate: _Rate
    num_safe: _Count
    left_out: LeftOut | None = None
    tokens_per_part: _Count = 0
    encoder: Annotated[str, pydantic.Field(max_length=1000)] = ""


@dataclass(frozen=True)
class PromptGuard:
    """A trained guard. It judges conditionings as a Concept Gate does, so either can open an expert or a guard.

    Attributes:
        vectors: of the concepts, [c, d].
        probe: what the encoder makes of `PROBE`, by which it is known again, [d].
    """

    matcher: Matcher = field(repr=False)
    vectors: Tensor = field(repr=False)
    probe: Tensor = field(repr=False)
    facts: GuardFacts

    @property
    def concepts(self) -> dict[str, CategoryFacts]:
        """Category -> what is known of it."""
        return self.facts.categories

    @property
    def width(self) -> int:
        """Of the conditionings that it judges."""
        return self.vectors.shape[1]

    @cached_property
    def _members(self) -> Tensor:
        return members_of(self.facts.concepts, self.concepts)

    def scores(self, context: Tensor) -> Tensor:
        """Return each category's cosine [b, categories] of conditionings [b, t, d]: its concept that is nearest."""
        cosines = self.cosines(context).to(self._members.device)
        return torch.where(self._members[None], cosines[:, :, None], -1.0).amax(dim=1).to(context.device)

    @torch.no_grad()
    def cosines(self, context: Tensor) -> Tensor:
        """Return cosines [b, concepts] of conditionings [b, t, d]; of several parts that of the nearest."""
        self.matcher.to(context.device)
        parts = parts_of(context.float(), self.facts.tokens_per_part)
        found = self.matcher(parts, self.vectors.to(context.device))
        return found.reshape(len(context), -1, len(self.vectors)).amax(dim=1)

    def margins(self, context: Tensor) -> Tensor:
        """Return scores minus their thresholds, [b, categories]: above 0 is unsafe."""
        return margins(self.scores(context), self.facts.threshold, [c.threshold for c in self.concepts.values()])

    def opened(self, context: Tensor) -> Tensor:
        """Return for which categories conditionings [b, t, d] are unsafe, bool [b, categories]."""
        return self.margins(context) > 0

    def check_encoder(self, probe: Tensor) -> None:
        """Raise an InputError where the encoder is another: `probe` is its summary of `PROBE`."""
        if probe.shape != self.probe.shape or torch.cosine_similarity(probe.float(), self.probe, dim=0) < 0.98:
            raise InputError(
                f"this prompt guard was trained with another text encoder ({self.width} wide); load that one"
            )

    def __str__(self) -> str:
        facts = self.facts
        lines = [
            f"{name}: opens on {known.recall:.0%} of {known.num_unsafe} unsafe prompts held out, and on "
            f"{known.other_rate:.0%} of {known.num_other} of other categories"
            for name, known in facts.categories.items()
        ]
        lines.append(
            f"{facts.false_positive_rate:.1%} of {facts.num_safe} safe prompts held out are taken for unsafe; "
            f"threshold {facts.threshold:.3f} (cosine)"
        )
        if facts.left_out:
            lines.append(
                f"of concepts that it was not trained on, added afterwards: {facts.left_out.recall:.0%} of "
                f"{facts.left_out.num_unsafe} unsafe prompts"
            )
        return "\n".join(lines)


PROBE = "a photo of a bowl of fruit on a table"


def parts_of(context: Tensor, tokens_per_part: int) -> Tensor:
    """Return conditionings [b, t, d] in parts [b · parts, tokens_per_part, d]; whole where they are not made of any."""
    if not tokens_per_part or context.shape[1] % tokens_per_part:
        return context
    return context.reshape(-1, tokens_per_part, context.shape[2])


def margins(scores: Tensor, threshold: float, own: Sequence[float]) -> Tensor:
    """Return scores [n, categories] minus thresholds: the common one for the nearest category, for others their own."""
    thresholds = torch.tensor(own, device=scores.device).expand_as(scores).clone()
    thresholds.scatter_(1, scores.argmax(dim=1, keepdim=True), threshold)
    return scores - thresholds


def members_of(concepts: Sequence[ConceptFacts], categories: Sequence[str] | dict) -> Tensor:
    """Return which concept is of which category, bool [concepts, categories]."""
    return torch.tensor([[name in concept.categories for name in categories] for concept in concepts])


def write_prompt_guard(guard: PromptGuard, path: Path) -> None:
    """Write a guard as safetensors.

    Raises:
        SafetyExpertsError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in guard.matcher.state_dict().items()}
    tensors |= {"concepts": guard.vectors.contiguous(), "probe": guard.probe.contiguous()}
    write_tensors(path, tensors, {METADATA_KEY: guard.facts.model_dump_json()})


def read_prompt_guard(path: Path) -> PromptGuard:
    """Read a guard.

    Raises:
        InputError: no such file, or it holds something else.
    """
    tensors, metadata = read_tensors(path)
    try:
        facts = GuardFacts.model_validate_json(metadata[METADATA_KEY], strict=False)
    except KeyError:
        raise InputError(f"{path}: is no prompt guard of Safety Experts; train one, or choose another file") from None
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"][:1]))
        raise InputError(f"{path}: the guard's description is wrong at {where!r}; take the file anew") from None
    unnamed = {name for concept in facts.concepts for name in concept.categories} - set(facts.categories)
    vectors, probe = tensors.pop("concepts", None), tensors.pop("probe", None)
    if vectors is None or probe is None or probe.ndim != 1 or unnamed or not facts.categories:
        raise InputError(f"{path}: concepts, categories or probe are missing; take the file anew")
    if tuple(vectors.shape) != (len(facts.concepts), len(probe)):
        raise InputError(f"{path}: concepts are not {len(facts.concepts)} vectors of {len(probe)}; take the file anew")
    matcher = _matcher_of(tensors, len(probe), path)
    if not all(tensor.isfinite().all() for tensor in (vectors, probe)):
        raise InputError(f"{path}: holds numbers that are not finite; take the file anew")
    return PromptGuard(matcher, vectors.float(), probe.float(), facts)


def read_matcher(path: Path) -> Matcher:
    """Read weights alone: a guard's of ours, or the published ones (converted to safetensors with their own names).

    Raises:
        InputError: no such file, or it holds something else.
    """
    tensors, _ = read_tensors(path)
    tensors = {_own_name(name): tensor for name, tensor in tensors.items() if name not in ("concepts", "probe")}
    key = tensors.get("key.weight")
    if key is None or key.ndim != 2:
        raise InputError(f"{path}: holds no weights of a prompt guard; give a guard, or Latent Guard's converted file")
    return _matcher_of(tensors, key.shape[1], path)


def _own_name(name: str) -> str:
    layer, _, kind = name.partition(".")
    return "temperature" if name == "tempr" else f"{_PUBLISHED.get(layer, layer)}.{kind}" if kind else name


def _matcher_of(tensors: dict[str, Tensor], width: int, path: Path) -> Matcher:
    if not 1 <= width <= 100_000:
        raise InputError(f"{path}: is for conditionings {width} wide; take the file anew")
    matcher = Matcher(width)
    expected = {name: tensor.shape for name, tensor in matcher.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected or not all(
        tensor.isfinite().all() for tensor in tensors.values()
    ):
        raise InputError(f"{path}: the tensors are not those of a prompt guard {width} wide; take the file anew")
    matcher.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return matcher.requires_grad_(False).eval()


@dataclass(frozen=True)
class Decision:
    """A gate that was decided by a prompt's text: it opens the same categories whatever the conditioning.

    So one decision drives experts and guards on any model, also one whose text encoder is not the gate's. The negative
    prompt's rows are opened and closed with it.
    """

    concepts: dict[str, bool]
    width: None = None  # any conditioning

    def opened(self, context: Tensor) -> Tensor:
        """Return the decision for each of b conditionings, bool [b, categories]."""
        return torch.tensor([[*self.concepts.values()]], device=context.device).expand(len(context), -1)
