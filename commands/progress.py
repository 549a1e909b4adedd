"""The one progress bar of all commands."""

import contextlib
from collections.abc import Callable, Iterator


class Bars:
    """A bar on stderr for each stage, one after the other.

    Args:
        is_hidden: draw nothing; None draws only on a terminal.
    """

    def __init__(self, *, is_hidden: bool | None = None):
        from tqdm import tqdm

        self._tqdm, self._is_hidden = tqdm, is_hidden
        self._bar: tqdm | None = None
        self._stage = ""

    def show(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """Draw that `done` of `total` of a stage is done, with some numbers beside it."""
        if self._bar is None or self._stage != stage:
            self.close()
            self._bar, self._stage = self._tqdm(desc=stage, disable=self._is_hidden), stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if numbers:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()})

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def progress_bar(stage: str, *, is_hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that draws a bar on stderr, where that is a terminal and it is not hidden."""
    bars = Bars(is_hidden=is_hidden or None)
    try:
        yield lambda done, total: bars.show(stage, done, total)
    finally:
        bars.close()
