"""`safety-experts dataset`: import prompt pairs and images, check a dataset, count what it holds."""

import argparse
import json
from pathlib import Path

from ..errors import InputError, SafetyExpertsError
from ..files import check_usable

HELP = "import, check and count preference data"

_SUFFIXES = {"csv": (".csv",), "jsonl": (".jsonl",), "taxonomy": (".yaml", ".yml")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `import`, `check` and `stats`."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="import|check|stats")

    importing = verbs.add_parser("import", help="read prompt pairs; with --images, make a dataset of existing images")
    importing.add_argument("source", type=Path, metavar="SRC", help="a .csv (ours or CoProV2's), .jsonl or .yaml file")
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    importing.add_argument("--format", choices=sorted(_SUFFIXES), help="what SRC must be (default: by its suffix)")
    importing.add_argument("--images", type=Path, metavar="DIR", help="folder of the images a CoProV2 CSV names")

    checking = verbs.add_parser("check", help="list everything wrong with a dataset; exit 1 if there is anything")
    counting = verbs.add_parser("stats", help="count pairs by category, review, flags and size")
    for verb in (checking, counting):
        verb.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder")
    for verb, work in ((importing, _import), (checking, _check), (counting, _count)):
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.set_defaults(work=work)


def run(arguments: argparse.Namespace) -> None:
    """Do the chosen verb."""
    arguments.work(arguments)


def _import(arguments: argparse.Namespace) -> None:
    source, out = arguments.source, arguments.out
    if arguments.format and source.suffix.lower() not in _SUFFIXES[arguments.format]:
        wanted = " or ".join(_SUFFIXES[arguments.format])
        raise InputError(
            f"{source}: --format {arguments.format} reads {wanted} files; rename the file or leave --format out"
        )
    from ..preferences.pairs import read_prompt_pairs, write_prompt_pairs
    from ..preferences.records import refuse_links

    check_usable(out)
    refuse_links(out)
    if arguments.images:
        _import_images(arguments)
        return

    pairs = read_prompt_pairs(source)
    target = out / "prompt_pairs.jsonl"
    if target.exists() and read_prompt_pairs(target) != pairs:
        raise InputError(f"{target} holds other prompt pairs; choose another --out, or delete it first")
    write_prompt_pairs(target, pairs)
    categories = sorted({name for pair in pairs for name in pair.categories})
    if arguments.json:
        print(json.dumps({"file": str(target), "prompt_pairs": len(pairs), "categories": categories}))
    else:
        print(f"{target}: {len(pairs)} prompt pairs ({', '.join(categories)})")


def _import_images(arguments: argparse.Namespace) -> None:
    from ..preferences.importing import import_coprov2

    if arguments.source.suffix.lower() != ".csv":
        raise InputError(
            f"{arguments.source}: --images needs a CSV in CoProV2's layout (columns prompt, image, category)"
        )
    dataset = import_coprov2(arguments.source, arguments.images, arguments.out, _show_progress("importing"))
    if arguments.json:
        print(json.dumps({"folder": str(dataset.folder), "pairs": len(dataset.pairs)}))
    else:
        print(f"{dataset.folder}: {len(dataset.pairs)} pairs")


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

    summary = summarise_pairs(PreferenceDataset.open(arguments.folder).pairs)
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        print(f"{name}: {value}")


def _show_progress(verb: str):
    """Return a callback (done, in all) that draws a bar on a terminal and nothing elsewhere."""
    from tqdm import tqdm

    bar = tqdm(desc=verb, unit="pair", disable=None, leave=False)

    def show(done: int, in_all: int) -> None:
        bar.total = in_all
        bar.update(done - bar.n)
        if done == in_all:
            bar.close()

    return show
