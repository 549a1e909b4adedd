"""Tensors computed once and kept on disk: append-only safetensors shards, each written whole or not at all."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import InputError
from ..files import refuse_link, write_atomically
from ..tensor_file import TensorFile

logger = logging.getLogger(__name__)


class TensorStore:
    """A folder of shards `<name>-00000.safetensors`, read lazily by key.

    Args:
        folder: made when the first shard is written.
        name: prefix of the shards; several stores may share a folder.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self._readers: dict[str, TensorFile] = {}
        self._names: dict[str, list[str]] = {}
        self._next_shard = 0
        for cache_folder in (folder.parent, folder):
            refuse_link(cache_folder)  # a dataset's cache comes with the dataset, from whoever made it
        for path in sorted(folder.glob(f"{name}-*.safetensors")):
            refuse_link(path)
            try:
                self._open(path)
            except InputError:
                logger.warning("%s is damaged and is computed again", path)
                path.unlink()

    def _open(self, path: Path) -> None:
        reader = TensorFile(path)
        self._readers.update(dict.fromkeys(reader, reader))
        for key in reader:
            whole, _, name = key.rpartition(".")
            if name not in self._names.setdefault(whole, []):
                self._names[whole].append(name)
        self._next_shard = int(path.stem.rsplit("-", 1)[1]) + 1

    def names(self, key: str) -> list[str]:
        """Return the names that tensors `<key>.<name>` are kept under."""
        return self._names.get(key, [])

    def __contains__(self, key: str) -> bool:
        return key in self._readers

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._readers[key][key]

    def add_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard and make its keys readable."""
        path = self.folder / f"{self.name}-{self._next_shard:05d}.safetensors"
        with write_atomically(path) as temporary:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary)
        self._open(path)
