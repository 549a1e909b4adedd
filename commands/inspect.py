"""`safety-experts inspect`: what an expert, a merge or any LoRA file contains."""

import argparse
import json
from typing import TYPE_CHECKING

from ..typed import printable

if TYPE_CHECKING:
    from ..experts.info import Origin, Parent, Trained

HELP = "print what an expert or merge contains, where it came from, and which keys ComfyUI will match"

_REMEDY = (
    "  stock ComfyUI ignores them without an error; write them the kohya way with: "
    "safety-experts merge {path} --method linear --out NEW.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a LoRA as safetensors")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> None:
    from ..experts.description import describe_file

    facts = describe_file(arguments.file)
    if arguments.json:
        print(json.dumps(facts.to_json(), indent=2, ensure_ascii=False))
        return
    info = facts.info
    print(f"{facts.name}: {facts.num_layers} layers, {_ranks(facts.ranks)}, alpha {_range(facts.alphas)}")
    print(f"categories: {', '.join(info.categories) or 'unknown (no safety_experts metadata)'}")
    if info.base_checkpoint.is_known:
        print(f"model: {info.base_checkpoint}")
    _print_origin(info.origin)
    if retained := info.retained_energy.values():
        mean = sum(retained) / len(retained)
        print(f"truncated: {mean:.1%} of a layer's change kept on average, {min(retained):.1%} at least")
    for category, strength in info.category_strengths.items():
        print(f"strength of {category}: multiplied by {strength:g} since")
    for block in facts.blocks:
        print(f"strength: {', '.join(block.categories) or block.name} ({len(block.ranks)} layers)")
    print(f"ComfyUI: knows the spelling of {facts.num_keys - len(facts.ignored_keys)} of {facts.num_keys} keys")
    if facts.ignored_keys:
        print(f"  not known, first: {printable(facts.ignored_keys[0])}")
        print(_REMEDY.format(path=arguments.file))


def _print_origin(origin: "Origin | None") -> None:
    from ..experts.info import Converted, Extracted, Merged, Protected, Trained

    if isinstance(origin, Trained):
        _print_training(origin)
    elif isinstance(origin, Merged):
        settings = ", ".join(f"{key} {value}" for key, value in origin.parameters.items())
        print(f"merged by: {origin.method}{f' ({settings})' if settings else ''}")
        for parent in origin.parents:
            print(f"  {1.0 if parent.weight is None else parent.weight:g} x {_parent(parent)}")
    elif isinstance(origin, Protected):
        style, *experts = map(_parent, origin.parents)
        print(f"protected: {style}, {origin.space} at strength {origin.strength:g}, from")
        print("\n".join(f"  {expert}" for expert in experts))
        _print_origin(origin.before)
    elif isinstance(origin, Extracted):
        print(f"extracted: {origin.tuned} minus {origin.base}, {origin.num_left_out} changed norms left out")
    elif isinstance(origin, Converted):
        print(f"converted: to rank {origin.rank} at most")
        _print_origin(origin.before)


def _print_training(training: "Trained") -> None:
    recipe = training.recipe_name or "of its own"
    kept = ("beta", "anchor_weight", "learning_rate", "batch_size")
    values = [f"{key} {value:g}" for key in kept if isinstance(value := training.recipe.get(key), int | float)]
    print(f"objective: {' + '.join(map(printable, training.objectives)) or 'none'}")
    print(f"recipe: {printable(recipe)}, seed {training.seed}{''.join(f', {value}' for value in values)}")
    state = "" if training.finished else " (unfinished: the training was stopped there)"
    pairs = "" if training.num_pairs is None else f", from {training.num_pairs} pairs"
    print(f"step: {training.step}{state}{pairs}")
    if "eval/residual" in training.metrics:
        residual, leak = training.metrics["eval/residual"], training.metrics.get("eval/leak", float("nan"))
        worst = training.metrics.get("eval/worst_leak", leak)  # older experts hold the worst alone
        print(f"held out: residual {residual:.3g}, leak {leak:.3g}, of the worst prompts {worst:.3g}")
    if training.shortfall:
        print(f"falls short: {printable(training.shortfall)}")
    for frozen in training.trained_with:
        print(f"trained with: {_parent(frozen)}")


def _parent(parent: "Parent") -> str:
    return f"{parent.name} [{', '.join(parent.categories)}] {parent.short_hash}"


def _range(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {_range([float(rank) for rank in ranks])}"
