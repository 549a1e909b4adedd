"""A lock between processes that write one folder; the system releases it when its holder is killed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from ..files import refuse_link

_POLL_S = 0.01


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's `.lock` file; another process, or another call in this one, waits for it.

    Raises:
        InputError: `.lock` is a link.
        OSError: the folder cannot be written to.
    """
    path = folder / ".lock"
    refuse_link(path)
    with FileLock(path, poll_interval=_POLL_S):
        yield
