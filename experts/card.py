"""An expert's card: what it is for, how it was made, what it did to the numbers; as JSON values and as a model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..typed import printable
from .description import FileDescription
from .info import Converted, Extracted, Merged, Origin, Protected, Trained

LICENCE_NOTE = (
    "The weights change a base model and are used with it only: its licence and acceptable-use terms go on holding. "
    "The licence of the pictures and prompts that the expert was trained on is not in this file; who shares it says."
)
# What the models of a family are called on hubs, as far as there is one.
_BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}
_METRICS = {
    "loss/preference": "preference loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy on the training pairs",
    "drift": "drift from the base model",
    "eval/untrained_loss": "held-out loss before training",
    "eval/loss": "held-out loss",
    "eval/rewards/accuracies": "held-out accuracy",
    "eval/drift": "held-out drift",
    "eval/residual": "held-out residual",
    "eval/leak": "worst held-out leak",
}


@dataclass(frozen=True)
class CardNumber:
    """The rate of unsafe pictures before and after, each with its 95 % interval, as (value, low, high) in 0..1."""

    label: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    num_images: int
    source: str


@dataclass(frozen=True)
class Card:
    """What there is to say of an expert file.

    Args:
        trained_on: a date, or when the file was written; None where that is not known.
        numbers: of an evaluation of this very file.
    """

    file: FileDescription
    trained_on: str | None = None
    numbers: Sequence[CardNumber] = ()

    @property
    def trained(self) -> Trained | None:
        return self.file.info.trained

    @property
    def state(self) -> str:
        """Finished or not, in a word; empty for what was not trained here."""
        if self.trained is None:
            return ""
        return "finished" if self.trained.finished else "unfinished: its training was stopped"

    def metrics(self) -> dict[str, float]:
        """Return the training's own measurements of its last step, by their names for people."""
        found = self.trained.metrics if self.trained else {}
        return {text: found[name] for name, text in _METRICS.items() if name in found}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for a page; the facts are the same as on the model card."""
        return {
            "name": self.file.name,
            "categories": list(self.file.info.categories),
            "strengths": strengths_of(self.file),
            "state": self.state,
            "facts": facts_of(self),
            "numbers": [
                {"label": n.label, "before": n.before, "after": n.after, "images": n.num_images, "source": n.source}
                for n in self.numbers
            ],
            "metrics": self.metrics(),
            "licence_note": LICENCE_NOTE,
            "sha256": self.file.sha256,
        }


def strengths_of(file: FileDescription) -> list[str]:
    """Return what has a strength of its own."""
    if file.blocks:
        return [", ".join(block.categories) or block.name for block in file.blocks]
    return list(file.info.categories) or ["other"]


def facts_of(card: Card) -> dict[str, str]:
    """Return name -> value of what is known, for a table."""
    info, trained = card.file.info, card.trained
    ranks = ", ".join(map(str, card.file.ranks))
    facts = {
        "Base model": info.base_checkpoint.name,
        "Family": info.base_checkpoint.family,
        "Base model's SHA-256": info.base_checkpoint.sha256,
        "Made by": origin_in_words(info.origin),
        "Layers": f"{card.file.num_layers}, rank {ranks}",
    }
    if trained:
        steps = trained.recipe.get("steps")
        facts |= {
            "Recipe": trained.recipe_name or "of its own",
            "Objective": " + ".join(trained.objectives),
            "Step": f"{trained.step}" + (f" of {steps}" if isinstance(steps, int) else "") + f", {card.state}",
            "Pairs": "" if trained.num_pairs is None else str(trained.num_pairs),
            "Seed": "" if trained.seed is None else str(trained.seed),
            "Falls short": trained.shortfall or "",
        }
    facts |= {"Trained": card.trained_on or "", "SHA-256": card.file.sha256}
    if card.file.ignored_keys:
        facts["Keys that ComfyUI ignores"] = str(len(card.file.ignored_keys))
    return {name: printable(value, 300) for name, value in facts.items() if value}


def origin_in_words(origin: Origin | None) -> str:
    """Return how an expert was made."""
    if isinstance(origin, Trained):
        return "training on preference pairs"
    if isinstance(origin, Merged):
        return f"merge ({origin.method}) of {', '.join(parent.name for parent in origin.parents)}"
    if isinstance(origin, Protected):
        style, *experts = (parent.name for parent in origin.parents)
        return f"protecting {style} from {', '.join(experts)}"
    if isinstance(origin, Extracted):
        return f"difference of {origin.tuned} and {origin.base}"
    if isinstance(origin, Converted):
        return f"conversion; before: {origin_in_words(origin.before)}"
    return "another tool"


def card_markdown(card: Card, *, licence: str = "other", base_model: str | None = None, picture: str = "") -> str:
    """Return a model card with the front matter that model hubs read.

    Args:
        licence: as hubs spell it; "other" says nothing.
        base_model: a hub's name; by default the well-known one of the family.
        picture: file name of the preview picture beside the card.
    """
    info = card.file.info
    base = base_model or _BASES.get(info.base_checkpoint.family)
    front: dict[str, Any] = {
        "license": licence,
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "text-to-image", "safety", "dpo", *(f"safety-{name}" for name in info.categories)],
    }
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    name = _cell(card.file.name)
    what = ", ".join(map(_cell, info.categories)) or "no stated category"
    lines = ["---", matter.rstrip(), "---", "", f"# {name}", ""]
    lines += [f"A LoRA safety expert: it turns a text-to-image model away from {what}.", ""]
    if card.trained and not card.trained.finished:
        lines += ["**Unfinished: its training was stopped.**", ""]
    if picture:
        lines += [f"![before and after, for an unsafe and a safe prompt]({picture})", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in facts_of(card).items()), ""]
    lines += [
        "## Use",
        "",
        "In ComfyUI: *Load Safety Expert* and *Apply Safety Expert*, or any LoRA loader, at strength 1. Strengths: "
        f"{', '.join(map(_cell, strengths_of(card.file)))}.",
        "",
        "## Unsafe pictures, before and after",
        "",
    ]
    if card.numbers:
        lines += ["| | before | after | images |", "| --- | --- | --- | --- |"]
        lines += [f"| {_cell(n.label)} | {_rate(n.before)} | {_rate(n.after)} | {n.num_images} |" for n in card.numbers]
        lines += [
            "",
            f"With 95 % intervals, from {_cell(', '.join(dict.fromkeys(n.source for n in card.numbers)))}.",
            "",
        ]
    else:
        lines += ["No evaluation of this file is known. Make one: `safety-experts evaluate --expert FILE …`.", ""]
    if metrics := card.metrics():
        lines += ["## Training's own measurements", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
        lines += [""]
    lines += [
        "## Limits and licence",
        "",
        "An expert lowers how often unsafe pictures are drawn; it does not rule them out, and who has the weights can "
        "leave it out.",
        "",
        LICENCE_NOTE,
    ]
    return "\n".join(lines) + "\n"


def _rate(rate: tuple[float, float, float]) -> str:
    value, low, high = (f"{100 * number:.1f}" for number in rate)
    return f"{value} % ({low} to {high})"


def _cell(text: str) -> str:
    """Return foreign text as a cell of a table: no markup, no line."""
    plain = printable(text, 300)
    for letter in "\\`*_{}[]<>|#!":
        plain = plain.replace(letter, f"\\{letter}")
    return plain
