"""One module a verb: argument parsing only; the work is in the library rooms.

A command module has `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> None`.
"""

import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence

from ..errors import InputError, SafetyExpertsError, did_you_mean
from ..typed import printable
from .outputs import forgiving_output
from .parser import Parser

COMMANDS = (
    "dataset",
    "review",
    "judge-train",
    "verifier",
    "guard",
    "train",
    "soft-prompt",
    "merge",
    "protect",
    "convert",
    "extract",
    "inspect",
    "card",
    "reproduce",
    "residual",
    "prefill",
    "evaluate",
    "attack",
    "demo",
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code (0 done, 1 the work failed, 2 the arguments or the input are wrong)."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with forgiving_output():
            return _run(given)
    except SafetyExpertsError as error:  # the last of the output could not be written
        return _fail(str(error), 1)


def _run(given: list[str]) -> int:
    try:
        with _stopped_by_sigterm():
            parsed = _parse(given)
            parsed.run(parsed)
    except InputError as error:
        return _fail(str(error), 2)
    except SafetyExpertsError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept, run the same command again to continue", 1)
    except OSError as error:
        if error.filename is None:
            return _fail(_unexpected(error), 1)
        return _fail(f"{error.filename}: {error.strerror}; check the name, and that you may read and write there", 2)
    except MemoryError:
        return _fail("out of memory; close other programs, or use smaller files or settings", 1)
    except Exception as error:
        return _fail(_unexpected(error), 1)
    return 0


def _parse(given: list[str]):
    if any("\0" in word for word in given):
        raise InputError("an argument holds the character NUL; leave it out")
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        guess = did_you_mean(given[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise InputError(f"no command {printable(given[0], 50)!r}{guess}")
    # Only the named command is imported, so `--help` does not wait for torch.
    named = [name for name in COMMANDS if name in given[:1]] or list(COMMANDS)
    parser = Parser("safety-experts", description="Train, merge, apply and measure safety experts.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name in named:
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser.parse_args(given)


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message, 2000)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, so that no half-written file stays."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unexpected(error: BaseException) -> str:
    """Write where an error that nobody foresaw came from to a file; return the one line that names it.

    The error's own text is left out: it may quote a prompt.
    """
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(lines) < 1000:
        lines += [f"{type(cause).__module__}.{type(cause).__qualname__}\n", *traceback.format_tb(cause.__traceback__)]
        cause = cause.__cause__ or cause.__context__
    try:
        handle, path = tempfile.mkstemp(prefix="safety-experts-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError:
        path = "nowhere, as no temporary file can be written"
    return f"unexpected {type(error).__name__}; please report it with its traceback, which is in {path}"
