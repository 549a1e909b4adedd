"""Which base model drew a dataset or was trained on: one type for every file that names one."""

from typing import Any

import pydantic

from .typed import FileRecord, Text


class CheckpointId(FileRecord):
    """A base model; without a hash it is not known which (nothing was drawn, or another tool made the file).

    Args:
        name: of the file or folder, for people.
        sha256: of its bytes; two files of one hash are one model, whatever they are called.
        family: a name in `models.families`.
        files: of a model in several files, part -> sha256 (where there is no single file).
        patches: hashes of what was added to the weights when it drew, in order.
    """

    name: Text = ""
    sha256: Text = ""
    family: Text = ""
    files: dict[Text, Text] = {}  # noqa: RUF012 - pydantic copies defaults
    patches: tuple[Text, ...] = ()

    @property
    def is_known(self) -> bool:
        return bool(self.sha256 or self.files)

    def is_same_model(self, other: "CheckpointId") -> bool:
        """Say whether both are one model, under whatever name."""
        if self.is_known or other.is_known:
            return (self.sha256, self.files, self.patches) == (other.sha256, other.files, other.patches)
        return self.name == other.name

    @pydantic.model_serializer(mode="wrap")
    def _only_what_is_known(self, handler: Any) -> dict[str, Any]:
        # Datasets and experts made before `files` and `patches` keep their bytes, and their fingerprints.
        return {name: value for name, value in handler(self).items() if value}

    def __str__(self) -> str:
        return f"{self.name or 'a model without a name'} ({self.family or 'unknown family'}, sha256 {self.sha256[:12]})"
