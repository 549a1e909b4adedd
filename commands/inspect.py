"""`safety-experts inspect`: what an expert, a merge or any LoRA file contains."""

import argparse
import json

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
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    print(f"{facts['name']}: {facts['num_layers']} layers, {_ranks(facts['ranks'])}, alpha {_range(facts['alphas'])}")
    print(f"categories: {', '.join(facts['categories']) or 'unknown (no safety_experts metadata)'}")
    if base := facts.get("base_checkpoint"):
        print(f"trained on: {base.get('name')} ({base.get('family')}, sha256 {str(base.get('sha256'))[:12]})")
    for frozen in facts.get("trained_with", ()):
        print(f"trained with: {frozen['name']} ({(frozen['sha256'] or frozen['tensors_sha256'])[:12]})")
    if recipe := facts.get("recipe"):
        shown = ("beta", "anchor_weight", "learning_rate", "batch_size")
        values = ", ".join(f"{key} {recipe[key]:g}" for key in shown if key in recipe)
        print(f"recipe: {facts.get('objective')}, {facts.get('step')} steps, seed {facts.get('seed')}, {values}")
    if method := facts.get("method"):
        settings = ", ".join(f"{key} {value}" for key, value in facts["parameters"].items())
        print(f"merged by: {method}{f' ({settings})' if settings else ''}")
        for parent in facts["parents"]:
            sha = parent["sha256"] or parent["tensors_sha256"]
            weight = f"{parent['weight']:g} x " if "weight" in parent else ""  # protection has none
            print(f"  {weight}{parent['name']} [{', '.join(parent['categories'])}] {sha[:12]}")
    if origin := facts.get("extracted"):
        print(f"extracted: {origin['tuned']} minus {origin['base']}")
    if retained := facts.get("retained_energy"):
        print(
            f"truncated: {retained['mean']:.1%} of a layer's change kept on average, {retained['least']:.1%} at least"
        )
    for block in facts["rank_blocks"]:
        print(f"dial: {', '.join(block['categories']) or block['name']} ({block['num_layers']} layers)")
    matched, ignored = facts["comfyui"]["matched_keys"], facts["comfyui"]["ignored_keys"]
    print(f"ComfyUI: knows the spelling of {matched} of {matched + ignored} keys")
    if ignored:
        print(f"  not known, first: {facts['comfyui']['first_ignored'][0]}")
        print(_REMEDY.format(path=arguments.file))


def _range(values: list[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {_range([float(rank) for rank in ranks])}"
