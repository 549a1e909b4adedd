"""`safety-experts dataset`: import, export, check, count, judge, write, split and merge preference data."""

import argparse
import dataclasses
import json
from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from ..files import check_usable
from . import building, judging, writing

HELP = "import, export, check, count, judge, write, split and merge preference data"

_PROMPT_FILES = {"csv": (".csv",), "jsonl": (".jsonl",), "taxonomy": (".yaml", ".yml")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs."""
    from ..preferences.formats import FORMATS

    verbs = parser.add_subparsers(dest="verb", required=True)
    formats = "; ".join(f"{name}: {kind.title} ({kind.layout})" for name, kind in FORMATS.items())

    def add_verb(name: str, work, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, epilog=epilog)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.set_defaults(work=work)
        return verb

    importing = add_verb("import", _import, "read prompt pairs, or make a dataset of images in another format", formats)
    importing.add_argument("source", type=Path, metavar="SRC", help="a .csv, .jsonl or .yaml of prompts, or a format's")
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    choices = [*sorted(_PROMPT_FILES), *FORMATS]
    importing.add_argument("--format", choices=choices, help="what SRC is (default, for prompts: by its suffix)")
    importing.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images SRC names (default: beside)"
    )
    importing.add_argument("--category", default="", metavar="C[,C…]", help="where the format does not say them")

    exporting = add_verb("export", _export, "write the pairs to train on in another trainer's format", formats)
    exporting.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder")
    exporting.add_argument("--format", choices=FORMATS, required=True, help="see below")
    exporting.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    exporting.add_argument("--category", metavar="C", help="only pairs of this category")

    _add_comparing_verbs(add_verb)

    checking = add_verb("check", _check, "list everything wrong with a dataset; exit 1 if there is anything")
    counting = add_verb("stats", _count, "count pairs by category, review, flags and size")
    counting.add_argument(
        "--plots", type=Path, metavar="OUT", help="write PNG pictures of the numbers into this folder"
    )
    for verb in (checking, counting):
        verb.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder")
    building.add_arguments(verbs)
    judging.add_arguments(verbs)
    writing.add_arguments(verbs)


def _add_comparing_verbs(add_verb) -> None:
    near = {"type": float, "default": 0.8, "metavar": "J", "help": "prompts are near from this similarity of words on"}

    splitting = add_verb("split", _split, "parts between which nothing leaks: near prompts stay together")
    splitting.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder")
    splitting.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, of one dataset a part")
    splitting.add_argument("--parts", default="train=0.8,held-out=0.2", help="names and shares (default: %(default)s)")
    splitting.add_argument("--near", **near)
    splitting.add_argument("--seed", type=int, default=0, help="another seed draws other parts")

    leaking = add_verb("leaks", _find_leaks, "what two datasets have in common; exit 1 if there is anything")
    for name in ("first", "second"):
        leaking.add_argument(name, type=Path, metavar="DIR", help="a dataset folder")
    leaking.add_argument("--near", **near)

    merging = add_verb("merge", _merge, "one dataset of several; a pair in several stands there once")
    merging.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="dataset folders")
    merging.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    merging.add_argument("--mixed", action="store_true", help="also of several base checkpoints or settings")


def run(arguments: argparse.Namespace) -> None:
    """Do the chosen verb."""
    arguments.work(arguments)


def _import(arguments: argparse.Namespace) -> None:
    from ..preferences.formats import FORMATS
    from ..preferences.records import refuse_links

    source, out, name = arguments.source, arguments.out, arguments.format
    check_usable(source)
    check_usable(out)
    refuse_links(out)
    if arguments.images and not name:
        if source.suffix.lower() != ".csv":
            raise InputError(f"{source}: --images without --format needs a CSV in CoProV2's layout; name the --format")
        name = "coprov2"
    if name in FORMATS:
        _import_images(arguments, name)
        return
    if name and source.suffix.lower() not in _PROMPT_FILES[name]:
        wanted = " or ".join(_PROMPT_FILES[name])
        raise InputError(f"{source}: --format {name} reads {wanted} files; rename the file or leave --format out")
    if source.is_dir() or source.suffix.lower() == ".parquet":
        raise InputError(f"{source}: say what it is with --format, one of {', '.join(FORMATS)}")
    _import_prompts(arguments)


def _import_prompts(arguments: argparse.Namespace) -> None:
    from ..preferences.pairs import read_prompt_pairs, write_prompt_pairs

    pairs = read_prompt_pairs(arguments.source)
    target = arguments.out / "prompt_pairs.jsonl"
    if target.exists() and read_prompt_pairs(target) != pairs:
        raise InputError(f"{target} holds other prompt pairs; choose another --out, or delete it first")
    write_prompt_pairs(target, pairs)
    categories = sorted({name for pair in pairs for name in pair.categories})
    if arguments.json:
        print(json.dumps({"file": str(target), "prompt_pairs": len(pairs), "categories": categories}))
    else:
        print(f"{target}: {len(pairs)} prompt pairs ({', '.join(categories)})")


def _import_images(arguments: argparse.Namespace, name: str) -> None:
    from ..preferences.categories import canonical_categories
    from ..preferences.importing import import_dataset

    made = import_dataset(
        name,
        arguments.source,
        arguments.out,
        images_folder=arguments.images,
        categories=canonical_categories(arguments.category),
        on_progress=_show_progress("importing"),
    )
    folder, num_pairs = str(made.dataset.folder), len(made.dataset.pairs)
    if arguments.json:
        print(json.dumps({"folder": folder, "pairs": num_pairs, "skipped": made.skipped}))
        return
    left_out = "".join(f", {count} left out: {reason}" for reason, count in made.skipped.items())
    print(f"{folder}: {num_pairs} pairs{left_out}")


def _export(arguments: argparse.Namespace) -> None:
    from ..preferences.dataset import PreferenceDataset
    from ..preferences.exporting import export_dataset

    dataset = PreferenceDataset.open(arguments.folder)
    num_pairs = export_dataset(dataset, arguments.format, arguments.out, arguments.category)
    if arguments.json:
        print(json.dumps({"folder": str(arguments.out), "pairs": num_pairs, "format": arguments.format}))
    else:
        print(f"{arguments.out}: {num_pairs} pairs as {arguments.format}")


def _check(arguments: argparse.Namespace) -> None:
    from ..preferences.inspection import check_dataset

    problems = check_dataset(arguments.folder, _show_progress("checking"))
    if arguments.json:
        print(json.dumps({"problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"{arguments.folder}: nothing wrong")
    if problems:
        raise SafetyExpertsError(f"{arguments.folder}: {len(problems)} problem(s); see the list above")


def _count(arguments: argparse.Namespace) -> None:
    from ..preferences.dataset import PreferenceDataset
    from ..preferences.inspection import summarise_pairs

    pairs = PreferenceDataset.open(arguments.folder).pairs
    summary = summarise_pairs(pairs)
    if arguments.plots:
        from ..preferences.plots import plot_dataset

        summary["plots"] = [str(path) for path in plot_dataset(pairs, arguments.plots)]
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        if isinstance(value, list):
            value = ", ".join(value)
        print(f"{name}: {value}")


def _split(arguments: argparse.Namespace) -> None:
    from ..preferences.dataset import PreferenceDataset
    from ..preferences.splitting import parse_parts, split_dataset

    parts = parse_parts(arguments.parts)
    near = _checked_near(arguments.near)
    dataset = PreferenceDataset.open(arguments.folder)
    counts = split_dataset(dataset, arguments.out, parts, near=near, seed=arguments.seed)
    if arguments.json:
        print(json.dumps({str(arguments.out / name): count for name, count in counts.items()}))
    else:
        print("\n".join(f"{arguments.out / name}: {count} pairs" for name, count in counts.items()))


def _checked_near(near: float) -> float:
    if not 0 < near <= 1:
        raise InputError("--near: a similarity is above 0 and at most 1")
    return near


def _find_leaks(arguments: argparse.Namespace) -> None:
    from ..preferences.dataset import PreferenceDataset
    from ..preferences.leaks import find_leaks

    first, second = (PreferenceDataset.open(folder) for folder in (arguments.first, arguments.second))
    leaks = find_leaks(first, second, _checked_near(arguments.near))
    if arguments.json:
        print(json.dumps({"leaks": [dataclasses.asdict(leak) for leak in leaks]}))
    else:
        for leak in leaks:
            examples = ", ".join(f"{a} and {b}" if a != b else a for a, b in leak.examples)
            print(
                f"{leak.kind}: {leak.num_first} of {len(first.pairs)} and {leak.num_second} of {len(second.pairs)} "
                f"pairs, such as {examples}"
            )
        if not leaks:
            print("nothing in common")
    if leaks:
        raise SafetyExpertsError(f"{arguments.first} leaks into {arguments.second}; split them anew, or drop the pairs")


def _merge(arguments: argparse.Namespace) -> None:
    from ..preferences.dataset import PreferenceDataset
    from ..preferences.merging import merge_datasets

    datasets = [PreferenceDataset.open(folder) for folder in arguments.folders]
    pairs, counts = merge_datasets(datasets, arguments.out, mixed=arguments.mixed)
    if arguments.json:
        print(json.dumps({"folder": str(arguments.out), "pairs": len(pairs), "counts": counts}))
    else:
        print(
            "".join([f"{arguments.out}: {len(pairs)} pairs", *(f", {count} {what}" for what, count in counts.items())])
        )


def _show_progress(verb: str):
    """Return a callback (done, in all or 0) that draws a bar on a terminal and nothing elsewhere."""
    from tqdm import tqdm

    bar = tqdm(desc=verb, unit="pair", disable=None, leave=False)

    def show(done: int, in_all: int) -> None:
        bar.total = in_all or None
        bar.update(done - bar.n)
        if done == in_all:
            bar.close()

    return show
