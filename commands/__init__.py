"""One module a verb: argument parsing only; the work is in the library rooms.

A command module has `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> None`.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from ..errors import InputError, SafetyExpertsError

COMMANDS = ("dataset", "review", "train", "merge", "protect", "convert", "extract", "inspect", "reproduce", "demo")


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code (0 done, 1 the work failed, 2 the arguments or the input are wrong)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Only the named command is imported, so `--help` does not wait for torch.
    named = [name for name in COMMANDS if name in given[:1]] or list(COMMANDS)
    parser = argparse.ArgumentParser("safety-experts", description="Train, merge, apply and measure safety experts.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in named:
        module = importlib.import_module(f".{name}", __name__)
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    parsed = parser.parse_args(given)
    try:
        parsed.run(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SafetyExpertsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; what was finished is kept, run the same command again to continue", file=sys.stderr)
        return 1
    return 0
