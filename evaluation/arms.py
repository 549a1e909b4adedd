"""Arms of one model from what a command line names: experts, their strengths, several together; guards."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError
from ..experts.expert import Expert
from ..experts.expert_file import load_expert
from ..guards.concepts import ALLOWED, parse_concepts
from .guided import GuardTexts
from .plan import BASE, BASE_ARM, NEGATIVE, NULL, NULL_ARM, TWINS, TWINS_ARM, Arm, negative_arm

logger = logging.getLogger(__name__)

_PART = re.compile(r"(?P<file>.+?\.safetensors)(?:@(?P<strengths>[-\d.,]+))?(?P<plus>\+|$)")


@dataclass(frozen=True)
class LoadedArm:
    """An arm with what its model carries: experts with their strengths, and the file of each; or a guard."""

    arm: Arm
    experts: tuple[tuple[Expert, float], ...] = ()
    files: tuple[Path, ...] = ()
    guard: GuardTexts | None = None
    guard_lines: str = field(default="", repr=False)


def read_arms(
    specs: Sequence[str],
    *,
    guards: Sequence[str] = (),
    negative: str | None = None,
    with_twins: bool = False,
    with_null: bool = True,
) -> list[LoadedArm]:
    """Return the base model, what costs nothing, an arm for each expert and strength, the guards, and the null row.

    Args:
        specs: `[LABEL=]FILE[@STRENGTH[,STRENGTH…]]`, or files joined by `+` to be applied together.
        guards: `[LABEL=]FILE` with a concept a line, as Pair Guard takes them.
        negative: a negative prompt for an arm of its own.
        with_twins: an arm that draws the safe prompts in place of the unsafe ones.

    Raises:
        InputError: it is not of that form, there is no such file, or two arms have the same label.
    """
    loaded: dict[str, Expert] = {}
    arms = [LoadedArm(BASE_ARM)]
    if negative:
        arms.append(LoadedArm(negative_arm(negative)))
    if with_twins:
        arms.append(LoadedArm(TWINS_ARM))
    for spec in specs:
        found, files = _arms_of(spec, loaded)
        arms += [replace(arm, files=files) for arm in found]
    arms += [_guard_arm(spec) for spec in guards]
    if with_null:
        arms.append(LoadedArm(NULL_ARM))
    return arms


def _guard_arm(spec: str) -> LoadedArm:
    label, _, file = spec.rpartition("=")
    try:
        lines = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--guard {spec}: no text file; write a concept a line, category: unsafe | safe") from None
    try:
        concepts = tuple(parse_concepts(lines))
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    categories = sorted({concept.category for concept in concepts} - {ALLOWED})
    if not categories:
        raise InputError(f"{file}: nothing to guard against; write a concept a line, category: unsafe | safe")
    name = label or _slug(Path(file).stem)
    _check_label(name)
    about = {
        "guard": "pair",
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "categories": ", ".join(categories),
        "strength": 1.0,
    }
    return LoadedArm(Arm(name, "model", label or name, (about,)), guard=GuardTexts(concepts), guard_lines=lines)


def _arms_of(spec: str, loaded: dict[str, Expert]) -> tuple[list[LoadedArm], tuple[Path, ...]]:
    label, separator, rest = spec.partition("=")
    if not separator or "/" in label or "\\" in label or ".safetensors" in label:
        label, rest = "", spec
    parts, position = [], 0
    while match := _PART.match(rest, position):
        parts.append(match)
        position = match.end()
        if not match["plus"]:
            break
    if not parts or position != len(rest) or parts[-1]["plus"]:
        raise InputError(f"--expert {spec}: write FILE.safetensors, or FILE.safetensors@0.5 for half the strength")
    files = [match["file"] for match in parts]
    experts, paths = [], tuple(map(Path, files))
    for file in files:
        if file not in loaded:
            loaded[file] = load_expert(file)
        experts.append(loaded[file])
    strengths = [_strengths(match["strengths"], spec) for match in parts]
    if len(parts) > 1:
        if any(len(several) > 1 for several in strengths):
            raise InputError(f"--expert {spec}: experts applied together have one strength each")
        title = " + ".join(_title(e.name, s[0]) for e, s in zip(experts, strengths, strict=True))
        together = tuple((expert, several[0]) for expert, several in zip(experts, strengths, strict=True))
        return [_arm(label or "+".join(_slug(path.stem) for path in paths), title, together, None)], paths
    name = label or _slug(Path(files[0]).stem)
    return [
        _arm(
            name if strengths[0] == [1.0] else f"{name}@{strength:g}",
            _title(label or experts[0].name, strength),
            ((experts[0], strength),),
            name if len(strengths[0]) > 1 else None,
        )
        for strength in strengths[0]
    ], paths


def _arm(name: str, title: str, experts: tuple[tuple[Expert, float], ...], series: str | None) -> LoadedArm:
    _check_label(name)
    made_of = tuple(
        {
            "name": expert.name,
            "sha256": expert.file_sha256,
            "categories": ", ".join(expert.categories),
            "strength": strength,
        }
        for expert, strength in experts
    )
    return LoadedArm(Arm(name, "model", title, made_of, series, experts[0][1] if series else None), experts)


def _check_label(name: str) -> None:
    if name in (BASE, NULL, NEGATIVE, TWINS):
        raise InputError(f"label {name!r} is the base model's; name it otherwise, LABEL=FILE")


def _strengths(text: str | None, spec: str) -> list[float]:
    if text is None:
        return [1.0]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--expert {spec}: strengths are numbers such as 0.5, or several: 0.25,0.5,1") from None


def _title(name: str, strength: float) -> str:
    return name if strength == 1 else f"{name} at {strength:g}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "expert"


def warn_of_other_bases(arms: Sequence[LoadedArm], sha256: str) -> None:
    """Log which experts were trained on another checkpoint than the one they are evaluated on."""
    for expert in {id(expert): expert for arm in arms for expert, _ in arm.experts}.values():
        base = expert.info.base_checkpoint.sha256
        if base and base != sha256:
            logger.warning("%s was trained on another checkpoint than this one", expert.name)
