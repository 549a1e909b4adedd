"""The judges by name; nodes, command line and docs are made from this table."""

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from ...errors import InputError
from ...plain_yaml import load_yaml
from .classifier import CLASSIFIER
from .clip_concepts import CLIP_CONCEPTS
from .clip_heads import LAION_JUDGE, UNSAFE_HEADS_JUDGE
from .judge import Judge, JudgeChoice, JudgeKind, JudgeOptions, Rule, Scores
from .nudenet import NUDENET
from .q16 import Q16_JUDGE
from .toy_oracle import TOY_ORACLE
from .verifier import VERIFIER
from .vlm import VLM

JUDGES: dict[str, JudgeKind] = {
    "classifier": CLASSIFIER,
    "clip-concepts": CLIP_CONCEPTS,
    "q16": Q16_JUDGE,
    "unsafe-heads": UNSAFE_HEADS_JUDGE,
    "laion-nsfw": LAION_JUDGE,
    "nudenet": NUDENET,
    "verifier": VERIFIER,
    "vlm": VLM,
    "toy-oracle": TOY_ORACLE,
}

__all__ = [
    "JUDGES",
    "Judge",
    "JudgeChoice",
    "JudgeKind",
    "JudgeOptions",
    "Rule",
    "Scores",
    "choose_judge",
    "describe_judges",
    "parse_judges",
    "read_in_batches",
]


def choose_judge(kind_name: str, values: Mapping[str, Any] | None = None, name: str | None = None) -> JudgeChoice:
    """Return a judge of a kind with these option values; `rule` among them names its rule (default: the first).

    Raises:
        InputError: no such judge, or an option that is unknown, missing or wrong.
    """
    if kind_name not in JUDGES:
        raise InputError(f"no judge {kind_name!r}; choose from {', '.join(JUDGES)}")
    kind = JUDGES[kind_name]
    given = dict(values or {})
    rule = str(given.pop("rule", next(iter(kind.rules))))
    try:
        options = kind.options(**given)
    except pydantic.ValidationError as error:
        raise InputError(f"judge {name or kind_name}: {_first_problem(error, kind)}") from None
    return JudgeChoice(name or kind_name, kind_name, kind, options, rule)


def _first_problem(error: pydantic.ValidationError, kind: JudgeKind) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    option = ".".join(str(part) for part in first["loc"]) or "options"
    if first["type"] == "extra_forbidden":
        return f"unknown option {option!r} (known: {', '.join(['rule', *kind.options.model_fields])})"
    if first["type"] == "missing":
        return f"option {option!r} is missing: {kind.options.model_fields[str(first['loc'][0])].description}"
    return f"{option}: {first['msg']}"


def describe_judges() -> dict[str, dict[str, Any]]:
    """Return what help and docs print of every judge; rules and options are name -> text."""
    return {
        name: {
            "title": kind.title,
            "source_url": kind.source_url,
            "licence": kind.licence,
            "summary": kind.summary,
            "needs": kind.needs,
            "rules": {rule: found.summary for rule, found in kind.rules.items()},
            "options": {option: str(field.description) for option, field in kind.options.model_fields.items()},
        }
        for name, kind in JUDGES.items()
    }


def parse_judges(names: Sequence[str], settings: Sequence[str] = ()) -> list[JudgeChoice]:
    """Return the judges a command line asks for.

    Args:
        names: `KIND`, or `NAME=KIND` to use two of a kind.
        settings: `NAME.OPTION=VALUE`, values as YAML; `NAME.rule=…` chooses the rule.

    Raises:
        InputError: no such judge or option, a value that is wrong, or a name used twice.
    """
    kinds: dict[str, str] = {}
    for text in names:
        name, separator, kind = text.partition("=")
        if name in kinds:
            raise InputError(f"judge {name!r} is named twice; call one of them another name: second={kind or name}")
        kinds[name] = kind if separator else name
    values: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    for setting in settings:
        key, separator, text = setting.partition("=")
        name, dot, option = key.strip().rpartition(".")
        if not separator or not dot:
            raise InputError(f"{setting.partition('=')[0]!r} is not of the form judge.option=value")
        if name not in values:
            raise InputError(f"{key.strip()!r}: no judge {name!r} was asked for; there is {', '.join(kinds) or 'none'}")
        values[name][option] = load_yaml(text, key.strip())
    return [choose_judge(kind, values[name], name) for name, kind in kinds.items()]


def read_in_batches(judge: Judge, images: Sequence[Any], prompts: Sequence[str]) -> list[dict[str, float]]:
    """Return the scores of any number of images, read `judge.batch_size` at a time."""
    scores: list[dict[str, float]] = []
    for start in range(0, len(images), judge.batch_size):
        end = start + judge.batch_size
        scores += judge.read(images[start:end], prompts[start:end])
    return scores
