"""metadata.jsonl on disk: read without writing, appended durably, rewritten whole; other processes may write it too."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic_core

from ..errors import InputError
from ..files import open_plain, sync_folder, write_atomically
from .records import PreferencePair, parse_pair

_log = logging.getLogger(__name__)


class MetadataFile:
    """The pairs of a metadata.jsonl in file order, found by id; `read` takes in what others wrote since the last look.

    The writing methods are called under the folder's lock, after `read`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.pairs: list[PreferencePair] = []
        self.index: dict[str, int] = {}
        self.num_bytes = 0  # of whole lines, all of them taken in
        self._num_lines = 0
        self._digest = hashlib.blake2b()  # of those bytes: finds out whether they are still the same
        self._lacks_break = False  # the last pair's line does not end yet
        self._is_torn = False  # something that is no JSON follows
        self._state: tuple[int, ...] | None = None

    def read(self) -> None:
        """Take in new lines, or everything again when the file was rewritten; a half-written last line is left out.

        Raises:
            InputError: a line is wrong or the file is a link, naming line and field; no pairs are known then.
        """
        try:
            with open_plain(self.path) as file:
                state = _state_of(file.fileno())
                if state == self._state:
                    return
                data = file.read()
        except FileNotFoundError:
            self._forget()
            return
        if self._digest.digest() != hashlib.blake2b(data[: self.num_bytes]).digest():
            self._forget()
        try:
            self._take_in(data[self.num_bytes :])
        except BaseException:
            self._forget()
            raise
        self._state = state

    def _take_in(self, data: bytes) -> None:
        if self._lacks_break and data.startswith(b"\n"):
            self._consume(b"\n")
            data = data[1:]
            self._lacks_break = False
        end = data.rfind(b"\n") + 1
        tail = data[end:]
        for line in data[:end].split(b"\n")[:-1]:
            self._num_lines += 1
            if line.strip():
                self._add(line)
        self._consume(data[:end])
        self._is_torn = bool(tail) and not is_json(tail)
        if tail and not self._is_torn:
            # Nothing is missing but the line break: an editor's, or of a writer in the middle of its line.
            self._num_lines += 1
            self._add(tail)
            self._consume(tail)
            self._lacks_break = True

    def _consume(self, data: bytes) -> None:
        self._digest.update(data)
        self.num_bytes += len(data)

    def _add(self, line: bytes) -> None:
        where = f"{self.path} line {self._num_lines}"
        pair = parse_pair(line, where)
        if pair.id in self.index:
            raise InputError(f"{where}: its id stands on an earlier line too; remove one of the two lines")
        self.index[pair.id] = len(self.pairs)
        self.pairs.append(pair)

    def mend(self) -> None:
        """Complete a last line that lacks its line break, and remove one that is only half written."""
        if not self._lacks_break and not self._is_torn:
            return
        with open_plain(self.path, "ab") as file:
            if self._is_torn:
                _log.warning("%s: removed a last line that was only half written", self.path)
                os.ftruncate(file.fileno(), self.num_bytes)
            if self._lacks_break:
                file.write(b"\n")
                self._consume(b"\n")
        self._lacks_break = self._is_torn = False

    def append(self, pairs: Sequence[PreferencePair]) -> None:
        """Add pairs as lines, synced to the disk; lines that do not fit are taken back."""
        self.mend()
        if not pairs:
            return
        added = b"".join(pair.to_json().encode() + b"\n" for pair in pairs)
        with open_plain(self.path, "ab") as file:
            try:
                rest = memoryview(added)
                while rest:  # a disk that gets full takes a part first
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
                self._state = _state_of(file.fileno())
            except BaseException:
                os.ftruncate(file.fileno(), self.num_bytes)
                raise
        self._consume(added)
        self._num_lines += len(pairs)
        for pair in pairs:
            self.index[pair.id] = len(self.pairs)
            self.pairs.append(pair)

    def replace(self, changed: Mapping[str, PreferencePair]) -> None:
        """Put other pairs in the lines of their ids: the whole file is written anew, synced, and renamed into place."""
        pairs = [changed.get(pair.id, pair) for pair in self.pairs]
        with open_plain(self.path) as file:
            lines = [line for line in file.read(self.num_bytes).split(b"\n") if line.strip()]
        for name in changed:
            lines[self.index[name]] = pairs[self.index[name]].to_json().encode()
        data = b"\n".join([*lines, b""])
        with write_atomically(self.path) as temporary:
            temporary.write_bytes(data)
        sync_folder(self.path.parent)
        self._forget()
        self._consume(data)
        self._num_lines = len(lines)
        self.pairs.extend(pairs)
        self.index.update((pair.id, number) for number, pair in enumerate(pairs))


def _state_of(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_json(text: bytes) -> bool:
    """Say whether a last line is whole, whatever it says; the part of a line that a killed process wrote never is."""
    try:
        pydantic_core.from_json(text)
    except ValueError:
        return False
    return True
