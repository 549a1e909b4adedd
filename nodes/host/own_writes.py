"""Fingerprints of nodes that write to a dataset."""

import itertools

from .datasets import dataset_state


class OwnWrites:
    """Fingerprints of nodes that write to a dataset: the same before and after their own writing.

    A plain fingerprint of the folder would change by the node's own work, and the next queue would run the node and
    everything behind it (a training run!) again. Edits by anybody else still change it.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, int]] = {}  # dataset -> (state on disk, fingerprint)
        self._changes = itertools.count()

    def fingerprint(self, name: str) -> int:
        """Return a number that is new whenever somebody else changed the dataset since we last looked."""
        state = dataset_state(name)
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, next(self._changes))
        return self._known[name][1]

    def written(self, name: str) -> None:
        """Take the dataset's present state as our own work."""
        _, fingerprint = self._known.get(name, ("", next(self._changes)))
        self._known[name] = (dataset_state(name), fingerprint)


own_writes = OwnWrites()
