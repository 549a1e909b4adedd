"""Ctrl-C and a scheduler's SIGTERM ask long work to stop and save, instead of ending it anywhere."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether to stop; a second Ctrl-C interrupts at once.

    Under torchrun and accelerate a Ctrl-C comes twice, from the terminal and from the launcher, so that it only asks.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if not asked:
            print("stopping after this step, to save what there is", file=sys.stderr, flush=True)
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
