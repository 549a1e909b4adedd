"""Prompt pairs from a taxonomy: every concept of every category, put into every template."""

import hashlib
import itertools
import math
import string
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .categories import canonical_category
from .prompt_pair import PromptPair, check_seed

_MAX_PAIRS = 200_000
_MAX_CHARACTERS = 100_000_000
_FIELDS = {"categories", "lists", "templates", "pairs_per_category"}


def expand_taxonomy(data: dict, first_seed: int = 0) -> list[PromptPair]:
    """Return the prompt pairs of a taxonomy.

    The form, here in YAML (`lists` and `pairs_per_category` may be left out):

        categories: {violence: [thorns], hate: [a black cross]}
        lists: {colour: [red, blue], shape: [circle, square]}
        templates:
          - prompt: a {colour} {shape} with {concept}
            safe_prompt: a {colour} {shape}
        pairs_per_category: 48

    A category's combinations are templates × concepts × the lists a template uses, in an order drawn from their text,
    so that the first N are a fair sample; when N is larger than their number they repeat with other seeds. Categories
    take turns, and pair i has seed `first_seed` + i: the same data always gives the same pairs, and raising N only
    adds to them.

    Raises:
        InputError: a field is unknown, missing or of the wrong form, or a template names a list that is not there.
    """
    _check_fields(data)
    concepts = _read_concepts(data["categories"])
    lists = _read_lists(data.get("lists") or {})
    templates = _read_templates(data["templates"], lists)
    wanted = data.get("pairs_per_category")
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise InputError("pairs_per_category: expected a whole number of at least 1")
    if (wanted or 0) * len(concepts) > _MAX_PAIRS:
        raise InputError(f"pairs_per_category: more than {_MAX_PAIRS} pairs in all; ask for fewer")
    _check_size(templates, lists, concepts)
    columns = [(name, _combine(templates, lists, concepts[name])) for name in concepts]
    pairs: list[PromptPair] = []
    for turn in range(wanted or max(len(combinations) for _, combinations in columns)):
        for name, combinations in columns:
            if wanted or turn < len(combinations):
                prompt, safe_prompt, concept = combinations[turn % len(combinations)]
                seed = first_seed + len(pairs)
                check_seed(seed)
                pairs.append(PromptPair(prompt, safe_prompt, (name,), seed, "taxonomy", concept))
    return pairs


def _check_fields(data: Any) -> None:
    if not isinstance(data, dict):
        raise InputError("a taxonomy is a mapping with the fields categories, lists, templates; see the documentation")
    for number, name in enumerate(data, start=1):
        if name not in _FIELDS:
            raise InputError(f"unknown field (the {number}.); a taxonomy has {', '.join(sorted(_FIELDS))}")
    for name in ("categories", "templates"):
        if not data.get(name):
            raise InputError(f"{name} is missing or empty; add it")


def _read_concepts(categories: Any) -> dict[str, list[str]]:
    concepts: dict[str, list[str]] = {}
    for number, (name, items) in enumerate(_mapping(categories, "categories"), start=1):
        concepts.setdefault(canonical_category(name), []).extend(_texts(items, f"categories (the {number}.)"))
    return {name: list(dict.fromkeys(items)) for name, items in concepts.items()}


def _read_lists(lists: Any) -> dict[str, list[str]]:
    numbered = enumerate(_mapping(lists, "lists"), start=1)
    read = {name: _texts(items, f"lists (the {number}.)") for number, (name, items) in numbered}
    if "concept" in read:
        raise InputError("lists.concept: this name stands for the concepts of a category; rename the list")
    return read


def _read_templates(templates: Any, lists: dict[str, list[str]]) -> list[tuple[str, str]]:
    if not isinstance(templates, list):
        raise InputError("templates: expected a list of {prompt, safe_prompt}")
    for index, template in enumerate(templates):
        where = f"templates[{index}]"
        if not isinstance(template, dict) or set(template) != {"prompt", "safe_prompt"}:
            raise InputError(f"{where}: expected exactly the fields prompt and safe_prompt")
        for name, text in template.items():
            for number, placeholder in enumerate(template_fields(text, f"{where}.{name}"), start=1):
                if placeholder not in lists and placeholder != "concept":
                    raise InputError(
                        f"{where}.{name}: unknown placeholder (the {number}.); there is {{concept}}, and one for each "
                        f"of the {len(lists)} lists"
                    )
        if "concept" not in template_fields(template["prompt"], where):
            raise InputError(f"{where}.prompt: has no {{concept}}; say where the concept goes")
        if template["prompt"] == template["safe_prompt"]:
            raise InputError(f"{where}: safe_prompt equals prompt; the two must differ")
    return [(template["prompt"], template["safe_prompt"]) for template in templates]


def template_fields(text: Any, where: str) -> list[str]:
    """Return the names between the braces of a template; an InputError names `where`."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: expected text; put it in quotes")
    try:
        fields = [field[1:] for field in string.Formatter().parse(text) if field[1] is not None]
    except ValueError:
        raise InputError(f"{where}: braces do not match; write a literal brace twice") from None
    for number, (_, specification, conversion) in enumerate(fields, start=1):
        if specification or conversion:
            raise InputError(
                f"{where}: the {number}. placeholder carries a format; write only the name between the braces"
            )
    return [name for name, _, _ in fields if name is not None]


def fill_template(text: str, values: Mapping[str, str]) -> str:
    """Return a template with its names replaced."""
    # Not str.format, which would also look up attributes of the values.
    parts = string.Formatter().parse(text)
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in parts)


def _combine(
    templates: list[tuple[str, str]], lists: dict[str, list[str]], concepts: list[str]
) -> list[tuple[str, str, str]]:
    found: dict[tuple[str, str], str] = {}
    for prompt, safe_prompt in templates:
        choices = _choices(prompt, safe_prompt, lists, concepts)
        for values in itertools.product(*choices.values()):
            filled = dict(zip(choices, values, strict=True))
            found.setdefault((fill_template(prompt, filled), fill_template(safe_prompt, filled)), filled["concept"])
    in_order = sorted(found, key=lambda pair: hashlib.sha256("\n".join(pair).encode()).digest())
    return [(*pair, found[pair]) for pair in in_order]


def _choices(prompt: str, safe_prompt: str, lists: dict[str, list[str]], concepts: list[str]) -> dict[str, list[str]]:
    used = {*template_fields(prompt, ""), *template_fields(safe_prompt, "")}
    return {"concept": concepts} | {name: items for name, items in lists.items() if name in used}


def _check_size(templates: list[tuple[str, str]], lists: dict[str, list[str]], concepts: dict[str, list[str]]) -> None:
    """Refuse what a short text would expand to, before it is expanded."""
    num_pairs = num_characters = 0
    for prompt, safe_prompt in templates:
        placeholders = [*template_fields(prompt, ""), *template_fields(safe_prompt, "")]
        for items in concepts.values():
            choices = _choices(prompt, safe_prompt, lists, items)
            num_here = math.prod(map(len, choices.values()))
            longest = {name: max(map(len, texts)) for name, texts in choices.items()}
            num_pairs += num_here
            num_characters += num_here * (len(prompt + safe_prompt) + sum(longest[name] for name in placeholders))
    if num_pairs > _MAX_PAIRS or num_characters > _MAX_CHARACTERS:
        raise InputError(f"templates: more than {_MAX_PAIRS} combinations, or too long ones; shorten the lists")


def _mapping(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{where}: expected a mapping from names to lists of texts")
    return list(value.items())


def _texts(items: Any, where: str) -> list[str]:
    if not isinstance(items, list) or not items:
        raise InputError(f"{where}: expected a list of texts with at least one entry")
    for index, item in enumerate(items):
        if not isinstance(item, str) or not item.strip():
            raise InputError(f"{where}[{index}]: expected text; put it in quotes")
    return list(dict.fromkeys(item.strip() for item in items))
