"""What every verb promises of the file that it writes, and of what it prints."""

import argparse
import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import InputError, SafetyExpertsError
from ..files import remove_leftovers


def check_out(arguments: argparse.Namespace) -> None:
    """Refuse an --out that is not safetensors, or that exists without --overwrite; remove what a killed run left."""
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out {arguments.out} must end in .safetensors")
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out} is a folder; choose the name of a file")
    if arguments.out.exists() and not arguments.overwrite:
        raise InputError(f"--out {arguments.out} exists; choose another name or add --overwrite")
    remove_leftovers(arguments.out)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Inside, a closed pipe or an encoding that lacks a letter does not turn work that was done into a failure.

    Letters that stdout cannot show are printed as JSON escapes them.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ESCAPE)
    sys.stdout, sys.stderr = (_Forgiving(stream) if stream else stream for stream in before)  # type: ignore[assignment]
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Forgiving:
    """A text stream that goes silent when nobody reads it any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._silent_when_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silent_when_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _silent_when_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Windows says EINVAL of a closed pipe.
            is_closed = error.errno in (errno.EPIPE, errno.EINVAL)
            # What is still buffered goes nowhere, or Python complains of it when it ends.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if not is_closed:
                raise SafetyExpertsError(f"the output cannot be written: {error.strerror}; free some space") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    units = letters.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end


_ESCAPE = "safety-experts-escape"
codecs.register_error(_ESCAPE, _escape)
