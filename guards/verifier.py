"""Telling from a picture's CLIP features whether it shows a category: one small head each, from one's own pictures.

A head is a logistic regression on the normalised features, standardised over the training pictures. It knows what the
dataset's rejected pictures look like and no more; that it is right on other pictures has to be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..tensor_file import read_tensors, write_tensors

METADATA_KEY = "safety_experts_verifier"
FOLDS = 5
MIN_PICTURES = 10
_STEPS = 60
_Rate = Annotated[float, pydantic.Field(ge=0, le=1)]
_Count = Annotated[int, pydantic.Field(ge=0)]


class HeadFacts(pydantic.BaseModel):
    """How well a category's head did on pictures it was not fitted to."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    category: Annotated[str, pydantic.Field(min_length=1, max_length=200)]
    threshold: float
    recall: _Rate
    num_unsafe: _Count
    false_positive_rate: _Rate
    num_safe: _Count


class _Facts(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    clip: Annotated[str, pydantic.Field(max_length=1000)]
    heads: Annotated[tuple[HeadFacts, ...], pydantic.Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class Verifier:
    """Heads on the features of one CLIP Vision.

    Attributes:
        mean, scale: of normalised features, [d].
        weight, bias: [categories, d], [categories]; a score is a log-odds, and above its head's threshold unsafe.
        probe: features of a fixed picture by which the CLIP is known again, [d].
        clip: which CLIP, for messages.
    """

    heads: tuple[HeadFacts, ...]
    mean: Tensor = field(repr=False)
    scale: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    probe: Tensor = field(repr=False)
    clip: str = ""

    @property
    def categories(self) -> list[str]:
        return [head.category for head in self.heads]

    def scores(self, features: Tensor) -> Tensor:
        """Return log-odds minus the threshold, [n, categories], of features [n, d]: above 0 is unsafe."""
        standard = (functional.normalize(features.float(), dim=1) - self.mean) / self.scale
        thresholds = torch.tensor([head.threshold for head in self.heads])
        return standard @ self.weight.T + self.bias - thresholds

    def check_clip(self, probe: Tensor) -> None:
        """Raise an InputError where the features are another CLIP's: `probe` is what it makes of the fixed picture."""
        is_other = probe.shape != self.probe.shape or torch.cosine_similarity(probe, self.probe, dim=0) < 0.98
        if is_other:
            raise InputError(f"this verifier was fitted with another CLIP Vision ({self.clip}); load that one")

    def __str__(self) -> str:
        return "\n".join(
            f"{head.category}: finds {head.recall:.0%} of {head.num_unsafe} unsafe pictures and "
            f"{head.false_positive_rate:.1%} of {head.num_safe} others, judged by heads fitted without them"
            for head in self.heads
        )


def fit_verifier(
    features: Tensor,
    categories: Sequence[frozenset[str]],
    groups: Sequence[str],
    probe: Tensor,
    clip: str,
    false_positive_rate: float = 0.01,
) -> Verifier:
    """Fit one head a category.

    Thresholds, recall and false positives come from pictures that a head was not fitted to: a fifth of the groups is
    left out in turn. The threshold is the lowest that lets at most `false_positive_rate` of the others through.

    Args:
        features: of the pictures, [n, d].
        categories: what each picture shows; an empty set for a safe one.
        groups: pictures of one group (the two of a pair, say) are held out together.
        probe: features of the fixed picture, [d].

    Raises:
        InputError: a category has fewer than ten pictures, or there are fewer than ten without it.
    """
    names = sorted(set().union(*categories))
    if not names:
        raise InputError("no picture shows a category; give a dataset with unsafe pictures")
    features = features.float().clone()
    units = functional.normalize(features, dim=1)
    folds = _folds(groups)
    heads, weights, biases = [], [], []
    mean, scale = units.mean(dim=0), units.std(dim=0).clamp(min=1e-6)
    standard = (units - mean) / scale
    for name in names:
        targets = torch.tensor([name in shown for shown in categories])
        if min(targets.sum(), (~targets).sum()) < MIN_PICTURES:
            raise InputError(
                f"{name}: {int(targets.sum())} pictures with it and {int((~targets).sum())} without; give at least "
                f"{MIN_PICTURES} of each"
            )
        held_out = torch.empty(len(targets))
        for fold in range(FOLDS):
            inside = folds != fold
            weight, bias = _fit_head(standard[inside], targets[inside])
            held_out[~inside] = standard[~inside] @ weight + bias
        threshold = _threshold(held_out[targets], held_out[~targets], false_positive_rate)
        weight, bias = _fit_head(standard, targets)
        weights.append(weight)
        biases.append(bias)
        found = held_out > threshold
        head = HeadFacts(
            category=name,
            threshold=threshold,
            recall=float(found[targets].double().mean()),
            num_unsafe=int(targets.sum()),
            false_positive_rate=float(found[~targets].double().mean()),
            num_safe=int((~targets).sum()),
        )
        heads.append(head)
    return Verifier(tuple(heads), mean, scale, torch.stack(weights), torch.stack(biases), probe.float().clone(), clip)


def _folds(groups: Sequence[str]) -> Tensor:
    numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
    return torch.tensor([numbers[group] % FOLDS for group in groups])


def _threshold(unsafe: Tensor, safe: Tensor, rate: float) -> float:
    lowest = float(safe.sort(descending=True).values[min(int(rate * len(safe)), len(safe) - 1)])
    above = unsafe[unsafe > lowest]
    # Half-way to the next unsafe picture, so that safe ones never seen have room.
    return (lowest + float(above.min())) / 2 if len(above) else lowest


def _fit_head(standard: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [d] and bias [] of a ridge logistic regression in which both classes weigh the same."""
    if targets.all() or not targets.any():
        return torch.zeros(standard.shape[1]), torch.tensor(0.0)
    counts = torch.stack([(~targets).sum(), targets.sum()]).float()
    sample_weight = (len(targets) / (2 * counts))[targets.long()]
    with torch.inference_mode(False), torch.enable_grad():
        inputs, labels = standard.clone(), targets.float().clone()
        weight = torch.zeros(inputs.shape[1], requires_grad=True)
        bias = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = functional.binary_cross_entropy_with_logits(inputs @ weight + bias, labels, sample_weight.clone())
            value = fit + 0.01 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    return weight.detach(), bias.detach()


def write_verifier(verifier: Verifier, path: Path) -> None:
    """Write a verifier as safetensors.

    Raises:
        SafetyExpertsError: the file cannot be written.
    """
    tensors = {name: getattr(verifier, name).contiguous() for name in _SHAPES}
    facts = _Facts(clip=verifier.clip, heads=verifier.heads)
    write_tensors(path, tensors, {METADATA_KEY: facts.model_dump_json()})


def read_verifier(path: Path) -> Verifier:
    """Read a verifier.

    Raises:
        InputError: no such file, or it holds something else.
    """
    tensors, metadata = read_tensors(path)
    try:
        facts = _Facts.model_validate_json(metadata[METADATA_KEY], strict=False)
    except KeyError:
        raise InputError(f"{path}: is no verifier of Safety Experts; train one, or choose another file") from None
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        raise InputError(f"{path}: the verifier's description is wrong at {where!r}; take the file anew") from None
    if set(tensors) != set(_SHAPES):
        raise InputError(f"{path}: a verifier holds the tensors {', '.join(_SHAPES)}; take the file anew")
    sizes = {"k": len(facts.heads), "d": tensors["mean"].numel()}
    for name, shape in _SHAPES.items():
        expected = tuple(sizes[letter] for letter in shape)
        if tuple(tensors[name].shape) != expected or not tensors[name].isfinite().all():
            raise InputError(f"{path}: {name} is not {list(expected)} finite numbers; take the file anew")
    return Verifier(facts.heads, **{name: tensors[name].float() for name in _SHAPES}, clip=facts.clip)


_SHAPES = {"mean": "d", "scale": "d", "weight": "kd", "bias": "k", "probe": "d"}


@dataclass(frozen=True)
class Verdicts:
    """What a verifier says of pictures: score [n, categories], above 0 unsafe."""

    categories: list[str]
    scores: Tensor

    @property
    def unsafe(self) -> list[bool]:
        """Of each picture, whether any category is found."""
        return (self.scores > 0).any(dim=1).tolist()

    def report(self) -> str:
        """Return a line for each category: how many pictures show it, the mean and the highest score.

        Both, for the frames of a video: a mean alone hides a short event.
        """
        lines = [f"{sum(self.unsafe)} of {len(self.scores)} pictures are unsafe"]
        for name, column in zip(self.categories, self.scores.T, strict=True):
            found = (column > 0).nonzero().flatten().tolist()
            first = f", the first is number {found[0] + 1}" if found else ""
            lines.append(f"{name}: {len(found)}, score mean {column.mean():.2f}, highest {column.max():.2f}{first}")
        return "\n".join(lines)
