"""Attacks on the pack: thousands of damaged files and arguments through every verb, and prompts at a real server.

Three campaigns, all drawn from a seed: in process, through the real command, and hostile workflows and cancels on a
real ComfyUI. What must hold: no traceback, nothing that runs for more than 10 s, no byte changed outside the folder
that was meant, no server that dies, and no word of a prompt in an error. A case that breaks one of these is written
into the result with its seed; `--only SEED` runs it again.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_files import MARKER, ROOT, TEXTS, World, damage
from fuzz_server import hostile_prompts
from safety_experts.evaluation.machine import describe_machine

RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"
LIMIT_SECONDS = 10.0
DATASET_VERBS = ("split", "leaks", "merge", "judge", "stats", "write", "nonsense")
VERBS = (
    "inspect",
    "convert",
    "merge",
    "protect",
    "extract",
    "reproduce",
    "train",
    "import",
    "check",
    "stats",
    "export",
    "any",
)


@dataclass
class Finding:
    """What one case broke."""

    seed: int
    verb: str
    problem: str
    arguments: list[str]


@dataclass
class Report:
    """Of one campaign."""

    num_cases: int = 0
    exit_codes: Counter = field(default_factory=Counter)
    verbs: Counter = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        kinds = Counter(finding.problem.split(":")[0] for finding in self.findings)
        return {
            "cases": self.num_cases,
            "by_verb": dict(sorted(self.verbs.items())),
            "exit_codes": {str(code): count for code, count in sorted(self.exit_codes.items(), key=str)},
            "slowest_seconds": round(self.slowest_seconds, 2),
            **{kind: kinds.get(kind, 0) for kind in ("traceback", "hang", "changed outside", "told a text", "other")},
            "findings": [vars(finding) for finding in self.findings[:20]],
        }


def draw_case(world: World, seed: int) -> tuple[str, list[str]]:
    """Damage files of the working folder and return (verb, arguments) of one case."""
    from safety_experts.commands import COMMANDS

    dice = random.Random(seed)
    world.refresh()
    verb = dice.choice(VERBS)
    work = world.work
    loras = [path for path in sorted(work.glob("*.safetensors")) if path.stem not in ("base", "tuned", "counts")]
    files = {
        "inspect": dice.sample(loras, 1),
        "convert": dice.sample(
            [*loras, *[work / "loha.safetensors", work / "lokr.safetensors", work / "peft.safetensors"] * 3], 1
        ),
        "merge": dice.sample(loras, dice.randint(1, 3)),
        "protect": dice.sample(loras, 2),
        "extract": [work / "tuned.safetensors", work / "base.safetensors"],
        "reproduce": [
            dice.choice([path for path in loras if "merged" in path.stem or path.stem in ("co", "golden_protected")])
        ],
        "train": [work / "pairs"],
        "import": [work / dice.choice(["prompts.csv", "prompts.jsonl", "taxonomy.yaml", "pairs"])],
        **{name: [work / "pairs"] for name in ("check", "stats", "export")},
        "any": [dice.choice([work / "prompts.csv", work / "pairs", *loras])],
    }[verb]
    for path in files:
        if dice.random() < 0.6:
            damage(path, dice, world)
    out = ["--out", str(work / "made" / f"out{dice.randint(0, 1)}.safetensors")]
    names = [str(path) for path in files]
    commands = [name for name in (*COMMANDS, "mrege", "--help") if name != "demo"]  # which takes minutes
    arguments = {
        "inspect": ["inspect", *names, *(["--json"] if dice.random() < 0.3 else [])],
        "convert": ["convert", *names, *out],
        "merge": ["merge", *names, *out, *_merge_options(dice, work)],
        "protect": ["protect", names[0], "--expert", names[-1], *(out if dice.random() < 0.8 else [])],
        "extract": ["extract", *names, *out, "--rank", "2"],
        "reproduce": [
            "reproduce",
            *names,
            *(["--statistics", str(work / "counts.safetensors")] if dice.random() < 0.3 else []),
        ],
        "train": [
            "train",
            "--model",
            str(dice.choice([work / "tuned.safetensors", *loras])),
            "--dataset",
            *names,
            *out,
        ],
        "import": ["dataset", "import", *names, "--out", str(work / dice.choice(["made", "pairs"]))],
        "check": ["dataset", "check", *names],
        "stats": ["dataset", "stats", *names],
        "export": [
            "dataset",
            "export",
            *names,
            "--format",
            dice.choice(["coprov2", "trl", "kohya"]),
            "--out",
            str(work / "made"),
        ],
        "any": [*dice.choice([[name] for name in commands] + [["dataset", name] for name in DATASET_VERBS]), *names],
    }[verb]
    if verb == "train":
        arguments += _train_options(dice, work)
    if verb == "import" and dice.random() < 0.3:
        arguments += ["--images", str(dice.choice([work / "pairs" / "images", work, world.outside / "pictures"]))]
    if dice.random() < 0.25:
        _spoil_arguments(arguments, dice)
    if "review" in arguments:  # would serve until it is stopped
        arguments.append("--prot=1")
    return verb, arguments


def _merge_options(dice: random.Random, work: Path) -> list[str]:
    from safety_experts.experts.merging import METHODS

    method = dice.choice([*METHODS])
    options = ["--method", method]
    for parameter in METHODS[method].parameters:
        if dice.random() < 0.3:
            options += ["--set", f"{parameter.name}={dice.choice(TEXTS)}"]
    if METHODS[method].needs_counts and dice.random() < 0.8:
        counts = work / "counts.safetensors"
        if dice.random() < 0.5:
            damage(counts, dice, None)
        options += ["--statistics", str(counts)]
    if dice.random() < 0.4:
        options += ["--weights", dice.choice(["1,1", "0", "1e30,1e30", "nan,1", ",", "1e38", *TEXTS])]
    return options


def _train_options(dice: random.Random, work: Path) -> list[str]:
    recipe = work / "recipe.yaml"
    if dice.random() < 0.7:
        damage(recipe, dice, None)
    options = ["--recipe", str(recipe), "--device", "cpu"]
    for _ in range(dice.randint(0, 2)):
        options += ["--set", f"{dice.choice(['beta', 'steps', 'objective', 'rank', 'seed', 'x'])}={dice.choice(TEXTS)}"]
    if dice.random() < 0.2:
        options += ["--with-expert", str(work / "hate.safetensors")]
    return options


def _spoil_arguments(arguments: list[str], dice: random.Random) -> None:
    kind = dice.randrange(4)
    if kind == 0:
        arguments[dice.randrange(1, len(arguments)) if len(arguments) > 1 else 0] = dice.choice(TEXTS)
    elif kind == 1:
        option = dice.choice(
            ["--rank", "--energy", "--strength", "--space", "--device", "--set", "--format", "--images", "--jsno"]
        )
        arguments += [option, dice.choice(TEXTS)]
    elif kind == 2:
        arguments.pop(dice.randrange(len(arguments)))
    else:
        arguments.insert(dice.randrange(len(arguments) + 1), dice.choice(TEXTS))


class Hang(BaseException):
    """A case took longer than it may."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)  # one C call that does not return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def run_in_process(world: World, seed: int) -> tuple[str, list[str], int | None, str, float]:
    """Return (verb, arguments, exit code or None for a hang, stdout and stderr, seconds)."""
    from safety_experts.commands import run

    verb, arguments = draw_case(world, seed)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code: int | None = None
    start = time.perf_counter()
    os.chdir(world.folder)  # a text drawn as an argument may be taken for a folder to write
    try:
        with _alarm(LIMIT_SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
    except Hang:
        pass
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException as error:
        err.write(f"Traceback: {type(error).__name__}: {error}")
        code = 1
    finally:
        os.chdir(ROOT)
    seconds = time.perf_counter() - start
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return verb, arguments, code, "\0".join(texts), seconds


def run_command(world: World, seed: int) -> tuple[str, list[str], int | None, str, float]:
    """Do the same through the real command, whose start takes seconds of its own."""
    verb, arguments = draw_case(world, seed)
    arguments = [word.replace("\0", "") for word in arguments]
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    start = time.perf_counter()
    before = os.times()
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, cwd=world.folder, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return verb, arguments, None, "", time.perf_counter() - start
    after = os.times()
    text = "\0".join(stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return verb, arguments, done.returncode, text, seconds


def judge(world: World, code: int | None, text: str, arguments: Sequence[str]) -> str | None:
    """Return what a case broke, or None."""
    printed, errors = text.split("\0", 1) if "\0" in text else (text, "")
    if world.changed_outside():
        return "changed outside: something that nobody named is another one now"
    if code is None:
        return f"hang: longer than {LIMIT_SECONDS:g} s"
    if "Traceback" in errors or "error: unexpected" in errors:
        return f"traceback: {errors[-300:]}"
    if code not in (0, 1, 2):
        return f"other: exit code {code}: {errors[-200:]}"
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    if code and len(ours) != 1:
        return f"other: {len(ours)} error lines: {errors[-200:]}"
    # A file's name is where something is wrong, and a recipe's words are its user's own.
    told = errors.replace(f"/{MARKER}", "") if "error: recipe" not in errors else ""
    if MARKER in told and not any(MARKER in word for word in arguments):
        return f"told a text: {errors[-200:]}"
    if "\x1b" in errors + printed and not any("\x1b" in word for word in arguments):
        return "other: an escape sequence of a file on the terminal"
    if leftovers := [path.name for path in world.work.rglob(".*-????????.safetensors")]:
        return f"other: left {leftovers[0]}"
    return _judge_output(arguments, code)


def _judge_output(arguments: Sequence[str], code: int) -> str | None:
    """Whatever a verb calls done is a sound LoRA, as the safetensors library reads it."""
    import torch
    from safetensors.torch import load_file

    writes = arguments[:1] and arguments[0] in ("merge", "convert", "protect", "extract") and "--out" in arguments[:-1]
    if code or not writes or "--help" in arguments:
        return None
    path = Path(arguments[arguments.index("--out") + 1])
    try:
        tensors = load_file(path)
    except Exception as error:
        return f"other: exit 0, but what it wrote cannot be read: {type(error).__name__}"
    if not any(key.endswith("lora_down.weight") for key in tensors):
        return "other: exit 0, but it wrote no layer"
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or not torch.isfinite(tensor.float()).all():
            return f"other: exit 0, but it wrote {key} as {tensor.dtype} {list(tensor.shape)}, or not finite"
    return None


def campaign(world: World, seeds: Sequence[int], run: Callable[[World, int], Any], show: bool = False) -> Report:
    """Run cases and judge them."""
    report = Report()
    for seed in seeds:
        verb, arguments, code, text, seconds = run(world, seed)
        report.num_cases += 1
        report.verbs[verb] += 1
        report.exit_codes["hang" if code is None else code] += 1
        report.slowest_seconds = max(report.slowest_seconds, seconds)
        problem = judge(world, code, text, arguments)
        if not problem and seconds > LIMIT_SECONDS:
            problem = f"hang: {seconds:.1f} s"
        if problem:
            report.findings.append(Finding(seed, verb, problem, [word[:200] for word in arguments]))
            if show:
                print(f"seed {seed} {verb}: {problem}\n  {' '.join(arguments)[:500]!r}", flush=True)
        if show and report.num_cases % 500 == 0:
            print(f"{report.num_cases} cases, {len(report.findings)} findings", flush=True)
    return report


def main() -> None:
    """Run the campaigns and write their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--cancels", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="SEED", help="run one case and show it")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder) / "world")
            print(run_in_process(world, arguments.only))
        return
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    first = arguments.seed * 1_000_000
    for name, count, run in (
        ("in_process", arguments.cases, run_in_process),
        ("command", arguments.commands, run_command),
    ):
        if count:
            with tempfile.TemporaryDirectory() as folder:
                tempfile.tempdir = folder  # where tracebacks of unforeseen errors would go
                report = campaign(World(Path(folder) / "world"), range(first, first + count), run, show=True)
                tempfile.tempdir = None
            result[name] = report.to_json() | {"machine": describe_machine()}
            first += 500_000
    if arguments.prompts or arguments.cancels:
        result["server"] = hostile_prompts(arguments.prompts, arguments.cancels, arguments.seed) | {
            "machine": describe_machine()
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {name: {k: v for k, v in part.items() if k != "machine"} for name, part in result.items()}, indent=1
        )[:6000]
    )


if __name__ == "__main__":
    main()
