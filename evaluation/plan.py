"""What an evaluation draws: which arms, which prompts, which seeds, in which batches; the same on every start."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..files import write_atomically
from ..preferences.prompt_pair import MAX_SEED
from .samples import Key
from .suites import Suite, SuitePrompt

PLAN_NAME, PROMPTS_NAME = "plan.json", "prompts.jsonl"
ATTACKS_NAME = "attacks.jsonl"  # written by a search, before there is a plan
SCHEMA = "safety-experts/evaluation/1"
BASE, NULL, NEGATIVE, TWINS = "base", "null", "negative-prompt", "safe-prompts"
_BATCHES_IN_A_ROW = 16  # of one arm before the next: an arm's weights are seldom exchanged, and a stopped run is even

ArmKind = Literal["base", "null", "model"]


@dataclass(frozen=True)
class Arm:
    """One way to draw: the base model, the base model with other seeds (`null`), or the model with something on it.

    Args:
        id: short name, part of file names.
        title: how a report calls it.
        made_of: what is on the base model, as JSON values: experts with hashes and strengths.
        series: arms of one series are points of one curve (an expert at several strengths), `position` along it.
        draws_twins: the safe prompt of a pair is drawn in the place of its unsafe one.
    """

    id: str
    kind: ArmKind
    title: str
    made_of: tuple[dict[str, Any], ...] = ()
    series: str | None = None
    position: float | None = None
    draws_twins: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_@.,+-]+", self.id) or self.id.startswith("."):
            raise InputError(f"label {self.id!r}: use letters, digits and _ @ . , + - only")


BASE_ARM = Arm(BASE, "base", "base model")
NULL_ARM = Arm(NULL, "null", "base model, other seeds")
# What costs nothing, to hold a guard or an expert against.
TWINS_ARM = Arm(TWINS, "model", "base model, safe prompts instead", ({"drawn": "safe prompts"},), draws_twins=True)


def negative_arm(text: str) -> Arm:
    """Return the arm of the base model with a negative prompt; it is for whoever draws to give it."""
    return Arm(NEGATIVE, "model", "base model, negative prompt", ({"negative prompt": text},))


@dataclass(frozen=True)
class Task:
    """One image to draw."""

    arm: str
    suite: str
    prompt: SuitePrompt
    number: int
    seed: int
    text: str = field(repr=False)  # what is drawn

    @property
    def key(self) -> Key:
        return self.arm, self.suite, self.prompt.id, self.number

    @property
    def image(self) -> str:
        return f"images/{self.arm}/{self.suite}/{self.prompt.id}-{self.number}.png"


@dataclass(frozen=True)
class Plan:
    """Everything that decides an evaluation's images.

    Args:
        model: name, sha256 and family of the base model.
        generation: sampler settings, as JSON values.
        images_per_prompt: with a seed each; the first has the prompt's own.
        notes: what else a report says of how it was made (preset, training dataset, margins), not compared on resume.
    """

    model: dict[str, Any]
    generation: dict[str, Any]
    arms: tuple[Arm, ...]
    suites: tuple[Suite, ...]
    images_per_prompt: int = 1
    batch_size: int = 4
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (("label", [arm.id for arm in self.arms]), ("prompt list", [s.id for s in self.suites])):
            if repeated := {name for name in names if names.count(name) > 1}:
                raise InputError(f"{what} {sorted(repeated)[0]!r} is given twice; give one of them another name")
        if not any(suite.prompts for suite in self.suites):
            raise InputError("there is no prompt left to draw; give other prompts, or a preset that keeps some")

    def batches(self) -> list[list[Task]]:
        """Return the batches in drawing order: always the same ones, so that every start rounds alike.

        Prompts come in an order drawn by chance, so that a stopped run has some of every category.
        """
        chosen = [(suite.id, prompt) for suite in self.suites for prompt in suite.prompts]
        chosen.sort(key=lambda item: hashlib.sha256(f"{item[0]}/{item[1].id}".encode()).digest())
        images = [(suite, prompt, number) for suite, prompt in chosen for number in range(self.images_per_prompt)]
        # Images of one batch share their guidance.
        groups: dict[float | None, list] = {}
        for image in images:
            groups.setdefault(image[1].guidance, []).append(image)
        size = self.batch_size
        chunks = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
        return [
            [
                Task(arm.id, suite, prompt, number, _seed(prompt, number, arm.kind), _text(prompt, arm))
                for suite, prompt, number in chunk
            ]
            for start in range(0, len(chunks), _BATCHES_IN_A_ROW)
            for arm in self.arms
            for chunk in chunks[start : start + _BATCHES_IN_A_ROW]
        ]

    def order(self) -> list[Key]:
        """Return the keys of all samples as a finished samples.jsonl has them: by arm, then as the prompts stand."""
        return [
            (arm.id, suite.id, prompt.id, number)
            for arm in self.arms
            for suite in self.suites
            for prompt in suite.prompts
            for number in range(self.images_per_prompt)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "generation": self.generation,
            "images_per_prompt": self.images_per_prompt,
            "batch_size": self.batch_size,
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "suites": [
                {
                    "id": suite.id,
                    "sha256": suite.sha256,
                    "num_prompts": len(suite.prompts),
                    "prompts_sha256": _sha_of_prompts(suite),
                    "categories": suite.categories,
                    "dropped": suite.dropped,
                }
                for suite in self.suites
            ],
            "notes": self.notes,
        }


def _text(prompt: SuitePrompt, arm: Arm) -> str:
    return prompt.caption if arm.draws_twins and prompt.caption else prompt.text


def _seed(prompt: SuitePrompt, number: int, kind: ArmKind) -> int:
    if number == 0 and kind != "null":
        return prompt.seed
    digest = hashlib.sha256(json.dumps([prompt.seed, number, kind == "null"]).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def _sha_of_prompts(suite: Suite) -> str:
    return hashlib.sha256("\n".join(prompt.id for prompt in suite.prompts).encode()).hexdigest()


def check_folder(folder: Path) -> None:
    """Check that an evaluation can begin or go on in a folder; writes nothing.

    Raises:
        InputError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder with --out")
    if not folder.exists() or (folder / PLAN_NAME).exists():
        return
    if any(not item.name.startswith(".") and item.name != ATTACKS_NAME for item in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no evaluation; choose another folder with --out")


def start_folder(folder: Path, plan: Plan, judges: Sequence[dict[str, Any]]) -> None:
    """Write plan.json and prompts.jsonl, or go on in a folder whose images are of the same plan.

    Arms and judges may be added to a folder; model, sampler settings and prompts may not change.

    Args:
        judges: as `JudgeChoice.to_json` gives them.

    Raises:
        InputError: the folder holds something else, or was made differently.
    """
    check_folder(folder)
    path = folder / PLAN_NAME
    wanted = json.loads(json.dumps(plan.to_json() | {"judges": list(judges)}))
    if path.exists():
        _check_same(path, read_plan_json(folder), wanted)
    for leftover in folder.glob("images/*/*/.*.png"):  # of a killed process; nobody is drawing yet
        leftover.unlink(missing_ok=True)
    with write_atomically(folder / PROMPTS_NAME) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in _prompt_lines(plan)), encoding="utf-8")
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_note(folder: Path, name: str, value: Any) -> None:
    """Write down in plan.json what else a report says of how it was made.

    Raises:
        InputError: the folder holds no evaluation.
    """
    plan = read_plan_json(folder)
    plan["notes"][name] = value
    with write_atomically(folder / PLAN_NAME) as temporary:
        temporary.write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_same(path: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted["generation"].items():
        if there["generation"].get(name) != value:
            was = there["generation"].get(name)
            raise InputError(f"{path}: {name} is {was!r} there and {value!r} here; use the same, or another --out")
    same = [("model", "sha256"), ("model", "patches"), ("model", "functions"), ("images_per_prompt",), ("batch_size",)]
    for keys in same:
        before: Any = there
        now: Any = wanted
        for key in keys:
            before, now = before.get(key), now.get(key)
        if before != now:
            name = ".".join(keys)
            raise InputError(f"{path}: {name} is {before!r} there and {now!r} here; use the same, or another --out")
    prompts = {suite["id"]: suite["prompts_sha256"] for suite in there["suites"]}
    if prompts != {suite["id"]: suite["prompts_sha256"] for suite in wanted["suites"]}:
        raise InputError(f"{path}: it has other prompts; give the same prompts and preset, or another --out")
    known = {arm["id"]: arm["made_of"] for arm in there["arms"]}
    for arm in wanted["arms"]:
        if known.get(arm["id"], arm["made_of"]) != arm["made_of"]:
            raise InputError(f"{path}: {arm['id']!r} was another expert or strength; give it another label")
    present = {arm["id"] for arm in wanted["arms"]}
    wanted["arms"] += [arm for arm in there["arms"] if arm["id"] not in present]
    named = {judge["name"] for judge in wanted["judges"]}
    wanted["judges"] += [judge for judge in there["judges"] if judge["name"] not in named]


def _prompt_lines(plan: Plan) -> list[str]:
    return [
        json.dumps({"suite": suite.id, "id": prompt.id, **dataclasses.asdict(prompt)}, ensure_ascii=False)
        for suite in plan.suites
        for prompt in suite.prompts
    ]


def read_plan_json(folder: Path) -> dict[str, Any]:
    """Return plan.json.

    Raises:
        InputError: the folder holds no evaluation, or one of another version.
    """
    path = folder / PLAN_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no evaluation (no {PLAN_NAME}); give the folder `evaluate` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path}: not valid JSON; restore the file, or evaluate anew") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError(f"{path}: its schema is not {SCHEMA!r}; use the version of Safety Experts that wrote it")
    return found


def read_prompts(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (suite, prompt id) -> its line of prompts.jsonl; empty where the file was removed."""
    path = folder / PROMPTS_NAME
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {(line["suite"], line["id"]): line for line in lines}
