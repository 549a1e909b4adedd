"""What a judge is: a reader of pictures that gives raw numbers, and named rules that turn numbers into verdicts.

The two are apart on purpose: numbers are kept, so that another rule or threshold never needs the picture again, and a
rule's name is part of every number made with it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pydantic
from PIL import Image

from ...errors import InputError

Scores = Mapping[str, float]
# The concept names of a judge's own (categories, labels) are free; these would break `judge/side/score` keys.
_LABEL = re.compile(r"[\w.@-]+")


class Judge(Protocol):
    """A judge with its weights loaded.

    Attributes:
        version: what made the numbers (files by hash, library versions), for reports; scores of another version are
            not mixed with these.
        batch_size: pictures it likes to get at once.
    """

    version: str
    batch_size: int

    def read(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[dict[str, float]]:
        """Return raw numbers of each image, finite; {} for an image that could not be judged.

        Args:
            images: RGB, of any sizes.
            prompts: of each image. Most judges do not look at them, so that a prompt cannot decide a verdict.
        """
        ...


class JudgeOptions(pydantic.BaseModel):
    """Base of every judge's options; a field's description is its tooltip and its help."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Rule:
    """A named decision.

    Args:
        summary: the rule in words and numbers, as docs and reports print it.
        decide: (scores, options, categories) -> unsafe, safe, or None where the numbers say neither. `categories` are
            those the picture is asked about; a rule that knows no categories does not look at them.
    """

    summary: str
    decide: Callable[[Scores, Any, Sequence[str]], bool | None]


@dataclass(frozen=True)
class JudgeKind:
    """A registry entry.

    Args:
        source_url: where the method or the model comes from.
        licence: of the code and weights it needs.
        needs: the files or extras the user supplies, "nothing" if none.
        options: its typed options.
        rules: name -> rule; the first is the default.
        load: (options, device) -> the judge, loaded; the only place that opens files.
    """

    title: str
    source_url: str
    licence: str
    summary: str
    needs: str
    rules: Mapping[str, Rule]
    load: Callable[[Any, str], Judge]
    options: type[JudgeOptions] = JudgeOptions


@dataclass(frozen=True)
class JudgeChoice:
    """A judge as a user asked for it: which kind, with which options and rule. Holds no weights; cheap to pass around.

    Args:
        name: how scores and reports call it; the kind's name unless two of a kind are used.
        loader: in place of the kind's own, where weights come from the graph.
    """

    name: str
    kind_name: str
    kind: JudgeKind = field(repr=False)
    options: JudgeOptions
    rule: str
    loader: Callable[[str], Judge] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.name):
            raise InputError(f"judge name {self.name!r}: use letters, digits, and . @ - _ only")
        if self.rule not in self.kind.rules:
            raise InputError(f"{self.kind_name} has no rule {self.rule!r}; choose from {', '.join(self.kind.rules)}")

    @property
    def rule_id(self) -> str:
        """The name of a number made with this rule, such as `q16:argmax`."""
        return f"{self.name}:{self.rule}"

    def load(self, device: str = "cpu") -> Judge:
        """Load its weights.

        Raises:
            InputError: a file or an extra that it needs is missing or wrong; the message says which.
        """
        return self.loader(device) if self.loader else self.kind.load(self.options, device)

    def decide(self, scores: Scores, categories: Sequence[str] = (), rule: str | None = None) -> bool | None:
        """Return whether an image with these raw scores is unsafe; None where it could not be judged.

        Args:
            categories: canonical names of the categories asked about; () for any.
            rule: another rule of this judge than the chosen one.
        """
        if not scores:
            return None
        return self.kind.rules[rule or self.rule].decide(scores, self.options, categories)

    def to_json(self) -> dict[str, Any]:
        """Return what a report records of it."""
        return {
            "name": self.name,
            "kind": self.kind_name,
            "rule": self.rule,
            "rule_summary": self.kind.rules[self.rule].summary,
            "options": self.options.model_dump(mode="json"),
        }
