"""`safety-experts reproduce`: do a merge again from its parents and compare."""

import argparse
import json

from ..errors import SafetyExpertsError
from .progress import progress_bar

HELP = "do a merge again from its parents and compare it with the file"

# Another machine or thread count rounds differently, in the last digits of float32.
_TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="MERGED", help="a file that `merge` or `protect` wrote")
    parser.add_argument("parents", nargs="*", metavar="EXPERT", help="its parents, where they are not beside it")
    parser.add_argument("--statistics", metavar="FILE", help="the activation counts that it was merged by")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    from ..experts.reproduction import reproduce_merge

    with progress_bar("layers", is_hidden=arguments.json) as show:
        result = reproduce_merge(arguments.file, arguments.parents, arguments.statistics, on_layer=show)
    if arguments.json:
        print(json.dumps({"is_identical": result.is_identical, "relative_error": result.relative_error}))
    elif result.is_identical:
        print(f"{arguments.file}: reproduced, every bit the same")
    elif result.relative_error <= _TOLERANCE:
        print(f"{arguments.file}: reproduced up to rounding (relative error {result.relative_error:.1e})")
    if result.relative_error > _TOLERANCE:
        raise SafetyExpertsError(
            f"{arguments.file} is not the merge that its metadata describes: layer {result.worst_layer} differs by "
            f"{result.relative_error:.1e} of its size; merge the parents again"
        )
