"""What an expert's file says of itself (metadata `safety_experts`): what it is for, of which model, how it was made."""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from ..checkpoint_id import CheckpointId
from ..errors import InputError, SafetyExpertsError
from ..typed import FileRecord, Text, parse_json, read_record

METADATA_KEY = "safety_experts"
FORMAT_VERSION = 2

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class Parent(FileRecord):
    """An expert that another one was made from, or trained beside.

    Args:
        sha256: of its file, if there was one.
        tensors_sha256: of its layers, the same under every spelling and whatever its metadata say.
        weight: what a merge multiplied it by.
    """

    name: Text
    sha256: Text | None = None
    tensors_sha256: Text
    categories: tuple[Text, ...] = ()
    weight: float | None = None

    @property
    def short_hash(self) -> str:
        return (self.sha256 or self.tensors_sha256)[:12]


class Trained(FileRecord):
    """Trained from a preference dataset.

    Args:
        recipe: all training options, as `training.recipe` writes them; older versions of it are read there.
        step: the one that the weights are from.
        finished: False where the training was stopped before its end.
        metrics: of that step.
        encoding_id: of the VAE and text encoders, which need not be the base model's own.
        trained_with: experts that were part of the model, frozen.
        resumed_with: recipe fields that a resumed run changed.
        retained_sha256: of the user's prompts that had to stay as they were.
        shortfall: what the expert falls short of, in words; None where its recipe sets no target, or it is reached.
    """

    kind: Literal["trained"] = "trained"
    recipe: dict[str, JsonValue] = {}  # noqa: RUF012
    step: _Count = 0
    finished: bool = True
    seed: int | None = None
    num_pairs: _Count | None = None
    dataset_fingerprint: Text | None = None
    encoding_id: Text | None = None
    metrics: dict[Text, float] = {}  # noqa: RUF012
    trained_with: tuple[Parent, ...] = ()
    resumed_with: tuple[dict[str, JsonValue], ...] = ()
    retained_sha256: Text | None = None
    shortfall: Text | None = None

    @property
    def recipe_name(self) -> str:
        """The name of the recipe, empty where it had none."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) else ""

    @property
    def objectives(self) -> list[str]:
        """The names of the objectives that it was trained by."""
        named = self.recipe.get("objective")
        preferences = [named] if isinstance(named, str) else list(named) if isinstance(named, dict) else []
        return [*(["redirect"] if self.recipe.get("redirect") is True else []), *preferences]


class Merged(FileRecord):
    """Merged from others.

    Args:
        parameters: the method's own.
        statistics_sha256: of the activation counts that it was merged by.
        retained_energy: layer -> ‖truncated ΔW‖² / ‖ΔW‖², where the method truncates.
    """

    kind: Literal["merged"] = "merged"
    method: Text
    parameters: dict[Text, bool | int | float | Text] = {}  # noqa: RUF012
    parents: Annotated[tuple[Parent, ...], Field(min_length=1)]
    statistics_sha256: Text | None = None
    retained_energy: dict[Text, _Share] = {}  # noqa: RUF012


class Protected(FileRecord):
    """A style LoRA from which was removed what works where experts work.

    Args:
        parents: the style, then the experts.
        before: how the style was made.
    """

    kind: Literal["protected"] = "protected"
    space: Literal["output", "input", "both"]
    strength: _Share
    parents: Annotated[tuple[Parent, ...], Field(min_length=2)]
    before: "Origin | None" = None


class Extracted(FileRecord):
    """The difference of a fine-tuned model and its base (file names), truncated.

    Args:
        num_left_out: changed norms and biases, which cannot be in a LoRA.
    """

    kind: Literal["extracted"] = "extracted"
    tuned: Text
    base: Text
    rank: _Count
    energy: _Share = 1.0
    retained_energy: dict[Text, _Share] = {}  # noqa: RUF012
    num_left_out: _Count = 0


class Converted(FileRecord):
    """A LoHa, LoKr or foreign LoRA file, written as a LoRA.

    Args:
        before: how that file was made.
    """

    kind: Literal["converted"] = "converted"
    rank: _Count
    energy: _Share = 1.0
    retained_energy: dict[Text, _Share] = {}  # noqa: RUF012
    before: "Origin | None" = None


Origin = Annotated[Trained | Merged | Protected | Extracted | Converted, Field(discriminator="kind")]


class RankBlockEntry(FileRecord):
    """One contributor's share of the ranks: `rank` in every layer but those that `layers` names with another one."""

    name: Text
    categories: tuple[Text, ...] = ()
    rank: _Count
    layers: dict[Text, _Count] = {}  # noqa: RUF012


class ExpertInfo(FileRecord):
    """All that is known of an expert; empty for other people's LoRAs.

    Args:
        origin: None where another tool made it.
        rank_blocks: in rank order (blocks.py); None where the whole expert is one block.
        category_strengths: what its layers were multiplied by since they were made.
    """

    categories: tuple[Text, ...] = ()
    base_checkpoint: CheckpointId = CheckpointId()
    origin: Origin | None = None
    rank_blocks: tuple[RankBlockEntry, ...] | None = None
    category_strengths: dict[Text, float] = {}  # noqa: RUF012

    @property
    def trained(self) -> Trained | None:
        """How it was trained, where it comes from a training and nothing was changed since."""
        return self.origin if isinstance(self.origin, Trained) else None

    @property
    def retained_energy(self) -> Mapping[str, float]:
        """Layer -> share of its squared size that was kept, where it was truncated."""
        return self.origin.retained_energy if isinstance(self.origin, Merged | Extracted | Converted) else {}

    @property
    def parents(self) -> tuple[Parent, ...]:
        return self.origin.parents if isinstance(self.origin, Merged | Protected) else ()

    def to_json(self) -> str:
        """Return the metadata text; the same info gives the same text.

        Raises:
            SafetyExpertsError: a number in it is not finite, or a text is no Unicode.
        """
        values = {"format_version": FORMAT_VERSION} | self.model_dump(exclude_none=True)
        try:
            text = json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
            text.encode()
        except ValueError as error:
            raise SafetyExpertsError(f"metadata cannot be written ({error}); correct the recipe") from error
        return text


def read_info(metadata: Mapping[str, str], name: str) -> ExpertInfo:
    """Return the `safety_experts` metadata, empty for other people's files.

    Args:
        metadata: string metadata of a file.
        name: of the file, for errors.

    Raises:
        InputError: it is not JSON, a field is wrong, or a newer version of this pack wrote it.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        return ExpertInfo()
    where = f"{name}: metadata {METADATA_KEY!r}"
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise InputError(f"{where} is damaged (no JSON object); use another copy")
    version = values.pop("format_version", None)
    if version == 1:
        values = _from_version_1(values)
    elif version != FORMAT_VERSION:
        known = isinstance(version, int) and not isinstance(version, bool)
        shown = str(version) if known and abs(version) < 10**6 else "unknown"
        raise InputError(f"{name}: expert format {shown}, this version reads 1 and {FORMAT_VERSION}; update the pack")
    return read_record(ExpertInfo, values, where)


def _from_version_1(old: dict[str, Any]) -> dict[str, Any]:
    """Return the values of today's format: version 1 had all of them side by side, typed by what was there."""

    def chosen(*names: str) -> dict[str, Any]:
        return {name: old[name] for name in names if old.get(name) is not None}

    origin: dict[str, Any] | None = None
    retained = chosen("retained_energy")
    if "recipe" in old:
        trained = (
            "recipe",
            "step",
            "seed",
            "num_pairs",
            "dataset_fingerprint",
            "metrics",
            "trained_with",
            "resumed_with",
        )
        origin = {"kind": "trained", **chosen(*trained)}
        if isinstance(metrics := origin.get("metrics"), dict):
            origin["metrics"] = {
                key: value for key, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)
            }
    elif isinstance(extracted := old.get("extracted"), dict):
        origin = {"kind": "extracted", **extracted, **retained, **chosen("num_left_out")}
    elif "method" in old and old["method"] != "protect":
        origin = {"kind": "merged", **chosen("method", "parameters", "parents", "statistics_sha256"), **retained}
    if isinstance(converted := old.get("converted"), dict):
        origin = {"kind": "converted", **converted, **retained, "before": origin}
    if old.get("method") == "protect":
        parameters = old.get("parameters")
        parameters = parameters if isinstance(parameters, dict) else {}
        origin = {"kind": "protected", **parameters, **chosen("parents"), "before": origin}
    return {
        **chosen("base_checkpoint", "rank_blocks", "category_strengths"),
        "categories": old.get("categories", ()),
        "origin": origin,
    }
