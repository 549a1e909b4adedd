"""Trains a prompt guard from prompt pairs, and measures it on pairs that it was not trained on."""

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..preferences.prompt_pair import PromptPair
from .prompt_guard import (
    PROBE,
    CategoryFacts,
    ConceptFacts,
    GuardFacts,
    LeftOut,
    Matcher,
    PromptGuard,
    ReadText,
    margins,
    members_of,
    parts_of,
)

HELD_OUT = 5  # every so many scenes are held out
_LONGEST_CONCEPT = 8  # words; longer differences are no concept
_BATCH = 64


@dataclass(frozen=True)
class Options:
    """How a guard is trained.

    Attributes:
        false_positive_rate: fraction of the safe prompts that may be taken for unsafe, 0..1.
        steps: of at most 64 pairs of different concepts; 0 measures `start` as it is.
        leave_out: train up to five times more, each without some of the concepts, to see what it finds of them.
        start: weights to begin with.
    """

    false_positive_rate: float = 0.01
    steps: int = 300
    seed: int = 0
    leave_out: bool = True
    start: Matcher | None = None


def concept_of(pair: PromptPair) -> str:
    """Return the words that make a pair unsafe: as given, else those that its safe prompt lacks, else its category."""
    if pair.concept.strip():
        return " ".join(pair.concept.lower().split())
    unsafe, safe = pair.prompt.lower().split(), pair.safe_prompt.lower().split()
    parts = difflib.SequenceMatcher(None, safe, unsafe, autojunk=False).get_opcodes()
    words = [word for kind, _, _, start, end in parts if kind != "equal" for word in unsafe[start:end]]
    return " ".join(words) if 0 < len(words) <= _LONGEST_CONCEPT else pair.categories[0]


def train_prompt_guard(
    pairs: Sequence[PromptPair],
    read: Callable[[str], ReadText],
    options: Options,
    *,
    harmless: Sequence[str] = (),
    encoder: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PromptGuard:
    """Train a guard; a fifth of the scenes is held out for the threshold and for what is said of it.

    Args:
        pairs: those without a category or a safe prompt are left out; pairs of one safe prompt are one scene.
        read: encodes a text.
        harmless: prompts that are safe beside the pairs': near misses, so that it learns more than to see a longer
            prompt. A fifth of them is held out too.
        on_progress: called with (done, total): texts read, then steps.

    Raises:
        InputError: there are fewer than ten scenes, or the encoder cannot be read.
    """
    pairs = [pair for pair in pairs if pair.categories and pair.safe_prompt.strip()]
    scenes = sorted({pair.safe_prompt for pair in pairs})
    if len(scenes) < 2 * HELD_OUT:
        raise InputError(
            f"{len(scenes)} different safe prompts with a category; give at least {2 * HELD_OUT}, as some are held out"
        )
    random.Random(options.seed).shuffle(scenes)
    held_out = set(scenes[::HELD_OUT])
    harmless = [*dict.fromkeys(text for text in harmless if text.strip() and text not in scenes)]
    categories_of: dict[str, dict[str, None]] = {}
    for pair in pairs:
        categories_of.setdefault(concept_of(pair), {}).update(dict.fromkeys(pair.categories))
    names = sorted(categories_of)
    concepts = tuple(ConceptFacts(text=name[:1000], categories=tuple(categories_of[name])) for name in names)
    prompts = dict.fromkeys(["", *(t for pair in pairs for t in (pair.prompt, pair.safe_prompt)), *harmless])
    num_folds = min(HELD_OUT, len(names)) if options.leave_out and len(names) > 1 else 0
    progress = _Counter(on_progress, len(prompts) + len(names) + options.steps * (1 + num_folds))

    def read_one(text: str) -> ReadText:
        progress.add(1)
        return read(text)

    texts = _Texts({text: read_one(text).tokens for text in prompts})
    vectors = torch.stack([read_one(name).summary.float().cpu() for name in names])
    lines = [_Line(pair, names.index(concept_of(pair)), pair.safe_prompt in held_out) for pair in pairs]
    data = _Data(lines, harmless, texts, vectors)
    matcher = _fit(data, options, frozenset(), progress)
    threshold = _threshold(matcher, data, options.false_positive_rate)
    members = {name for concept in concepts for name in concept.categories}
    facts = GuardFacts(
        concepts=concepts,
        categories=_categories(matcher, data, concepts, sorted(members), threshold, options.false_positive_rate),
        threshold=threshold,
        **_false_positives(matcher, data, threshold),
        left_out=_left_out(data, options, num_folds, progress),
        tokens_per_part=texts.tokens_per_part,
        encoder=encoder,
    )
    return PromptGuard(matcher, vectors, read(PROBE).summary.float().cpu(), facts)


@dataclass(frozen=True)
class _Line:
    pair: PromptPair
    concept: int
    is_held_out: bool


class _Texts:
    """The tokens of all texts, in parts, half as precise as they are read: there may be thousands."""

    def __init__(self, tokens: Mapping[str, Tensor]):
        length = len(tokens[""])
        # CLIP reads in parts of 77; encoders of one window only grow it.
        is_in_parts = length == 77 and all(len(states) % length == 0 for states in tokens.values())
        self.tokens_per_part = length if is_in_parts else 0
        self._parts = {
            text: parts_of(states[None], self.tokens_per_part).half().cpu() for text, states in tokens.items()
        }

    def cosines(self, matcher: Matcher, texts: Sequence[str], vectors: Tensor) -> Tensor:
        """Return [texts, concepts]; of several parts the nearest counts."""
        parts = [self._parts[text] for text in texts]
        longest = max(part.shape[1] for part in parts)
        padded = torch.cat([functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts]).float()
        found = matcher(padded, vectors).split([len(part) for part in parts])
        return torch.stack([rows.amax(dim=0) for rows in found])


@dataclass(frozen=True)
class _Data:
    lines: Sequence[_Line]
    harmless: Sequence[str]
    texts: _Texts
    vectors: Tensor

    def harmless_held_out(self, is_held_out: bool) -> list[str]:
        return [text for i, text in enumerate(self.harmless) if (i % HELD_OUT == 0) == is_held_out]

    def safe_held_out(self) -> list[str]:
        safe = [line.pair.safe_prompt for line in self.lines if line.is_held_out]
        return [*dict.fromkeys([*safe, *self.harmless_held_out(True)])]

    @torch.no_grad()
    def cosines(self, matcher: Matcher, texts: Sequence[str]) -> Tensor:
        found = [
            self.texts.cosines(matcher, texts[start : start + _BATCH], self.vectors)
            for start in range(0, len(texts), _BATCH)
        ]
        return torch.cat(found) if found else torch.empty(0, len(self.vectors))


class _Counter:
    def __init__(self, show: Callable[[int, int], None], total: int):
        self._show, self._done, self._total = show, 0, total

    def add(self, number: int) -> None:
        self._done += number
        self._show(self._done, self._total)


def _fit(data: _Data, options: Options, without: frozenset[int], progress: _Counter) -> Matcher:
    """Train without the concepts of these numbers, by the published loss.

    With S_ij the score of unsafe prompt i for concept j, R_ij that of safe prompt i, and r_i the highest of R_i: cross
    entropy of [S | 1 rᵀ] along its rows and of [S ; R] along its columns, the right answer being the prompt's concept.
    """
    by_concept: dict[int, list[PromptPair]] = {}
    for line in data.lines:
        if not line.is_held_out and line.concept not in without:
            by_concept.setdefault(line.concept, []).append(line.pair)
    generator = random.Random(options.seed)
    harmless = data.harmless_held_out(False)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vectors = data.vectors.clone()
        matcher = Matcher(vectors.shape[1])
        if options.start is not None:
            if options.start.key.in_features != vectors.shape[1]:
                raise InputError(
                    f"the weights are for {options.start.key.in_features} wide texts and this text encoder's are "
                    f"{vectors.shape[1]} wide; use the encoder they were trained with"
                )
            matcher.load_state_dict(options.start.state_dict())
        optimizer = torch.optim.AdamW(matcher.parameters(), lr=1e-3)
        for _ in range(options.steps):
            chosen = generator.sample(sorted(by_concept), min(_BATCH, len(by_concept)))
            pairs = [generator.choice(by_concept[number]) for number in chosen]
            safe = [pair.safe_prompt for pair in pairs]
            safe += generator.sample(harmless, min(len(harmless), len(pairs)))
            texts = [pair.prompt for pair in pairs] + safe
            scores = matcher.temperature * data.texts.cosines(matcher, texts, vectors[chosen])
            unsafe, others = scores[: len(pairs)], scores[len(pairs) :]
            rows = torch.cat([unsafe, others.amax(dim=1).expand(len(pairs), -1)], dim=1)
            right = torch.arange(len(pairs))
            loss = functional.cross_entropy(rows, right) + functional.cross_entropy(scores.T, right)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.add(1)
    return _frozen(matcher)


def _frozen(matcher: nn.Module) -> Matcher:
    assert isinstance(matcher, Matcher)
    return matcher.requires_grad_(False).eval()


def _threshold(matcher: Matcher, data: _Data, rate: float, without: frozenset[int] = frozenset()) -> float:
    """Return the lowest cosine that at most this fraction of the safe prompts held out is above, and the empty one."""
    safe = data.cosines(matcher, data.safe_held_out()).amax(dim=1)
    lowest = max(_allowed(safe, rate), float(data.cosines(matcher, [""]).max()))
    known = [line.pair.prompt for line in data.lines if line.is_held_out and line.concept not in without]
    return _with_room(lowest, data.cosines(matcher, known).amax(dim=1) if known else torch.empty(0))


def _categories(
    matcher: Matcher,
    data: _Data,
    concepts: Sequence[ConceptFacts],
    names: Sequence[str],
    threshold: float,
    rate: float,
) -> dict[str, CategoryFacts]:
    """Return each category's own threshold, and what opens it of the unsafe prompts held out."""
    pairs = [line.pair for line in data.lines if line.is_held_out]
    cosines = data.cosines(matcher, [pair.prompt for pair in pairs])
    scores = torch.where(members_of(concepts, names)[None], cosines[:, :, None], -1.0).amax(dim=1)
    is_own = torch.tensor([[name in pair.categories for name in names] for pair in pairs])
    own = [
        max(threshold, _with_room(_allowed(scores[~is_own[:, k], k], rate), scores[is_own[:, k], k]))
        for k in range(len(names))
    ]
    opened = margins(scores, threshold, own) > 0
    return {
        name: CategoryFacts(
            threshold=own[k],
            recall=_fraction(opened[is_own[:, k], k]),
            num_unsafe=int(is_own[:, k].sum()),
            other_rate=_fraction(opened[~is_own[:, k], k]),
            num_other=int((~is_own[:, k]).sum()),
        )
        for k, name in enumerate(names)
    }


def _allowed(scores: Tensor, rate: float) -> float:
    """Return the lowest threshold that at most this fraction of the scores is above."""
    ordered = scores.sort(descending=True).values
    return float(ordered[min(int(rate * len(ordered)), len(ordered) - 1)]) if len(ordered) else -1.0


def _with_room(lowest: float, unsafe: Tensor) -> float:
    """Return a threshold half-way to the next unsafe prompt: the recall stays, and others never seen have room."""
    above = unsafe[unsafe > lowest]
    return (lowest + float(above.min())) / 2 if len(above) else lowest


def _fraction(found: Tensor) -> float:
    return float(found.double().mean()) if len(found) else 0.0


def _false_positives(matcher: Matcher, data: _Data, threshold: float) -> dict:
    safe = data.cosines(matcher, data.safe_held_out()).amax(dim=1)
    return {"false_positive_rate": _fraction(safe > threshold), "num_safe": len(safe)}


def _left_out(data: _Data, options: Options, num_folds: int, progress: _Counter) -> LeftOut | None:
    """Return what guards find of concepts that they were not trained on and were told afterwards."""
    if not num_folds:
        return None
    found = []
    for fold in range(num_folds):
        without = frozenset(range(fold, len(data.vectors), num_folds))
        matcher = _fit(data, options, without, progress)
        threshold = _threshold(matcher, data, options.false_positive_rate, without)
        prompts = [line.pair.prompt for line in data.lines if line.concept in without]
        found += (data.cosines(matcher, prompts).amax(dim=1) > threshold).tolist()
    return LeftOut(recall=sum(found) / len(found), num_unsafe=len(found))
