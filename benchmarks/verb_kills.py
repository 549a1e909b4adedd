"""Verbs that write survive SIGKILL: killed at random moments and run again, nothing is lost, half-written or left.

A killed run must leave what was there before as it was, or the whole new file, and no third thing. The next run must
come to the file of an undisturbed one, byte for byte, with nothing else in the folder. Some of the kills come in the
middle of writing, which is hard to hit by chance; half of them replace a file that is there (`--overwrite`).
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "verb_kills.json"
OLD = b"what was there before"
sys.path.insert(0, str(ROOT / "benchmarks"))


@dataclass(frozen=True)
class Verb:
    """A command line that writes `out`, a file or a folder."""

    name: str
    arguments: list[str]
    out: Path
    may_exist: bool  # --overwrite replaces a file of before


def main() -> None:
    """Kill, look, run again, compare; write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    from safety_experts.evaluation.machine import describe_machine

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_verbs(Path(folder), arguments.kills, arguments.seed)
    result |= {"seconds": round(time.perf_counter() - start, 1), **describe_machine()}
    print(json.dumps(result, indent=2))
    if any(
        result[name] for name in ("lost", "half_written", "differ_after_the_next_run", "leftovers_after_the_next_run")
    ):
        raise SystemExit("a killed verb left something wrong")
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def kill_verbs(folder: Path, num_kills: int, seed: int) -> dict:
    """Return the counts of `num_kills` kills, the verbs in turn."""
    dice, counts, killed = random.Random(seed), Counter(), Counter()
    with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
        verbs = make_verbs(folder)
    expected, seconds = {}, {}
    for verb in verbs:
        began = time.perf_counter()
        _finish(verb)
        seconds[verb.name] = time.perf_counter() - began
        expected[verb.name] = _state(verb.out)
        _clear(verb.out)
    while sum(killed.values()) < num_kills:
        verb = verbs[sum(killed.values()) % len(verbs)]
        before = None
        if verb.may_exist and dice.random() < 0.5:
            verb.out.write_bytes(OLD)
            before = _state(verb.out)
        if verb.may_exist and dice.random() < 0.6:
            child = _start(verb, dies_after=dice.randrange(1, 60))
        else:
            child = _start(verb)
            time.sleep(dice.uniform(0.0, 1.1) * seconds[verb.name])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] != signal.SIGKILL:
            counts["was_done_already"] += 1
            if counts["was_done_already"] > 10 * num_kills:
                raise SystemExit("the verbs end before they can be killed")
        else:
            killed[verb.name] += 1
            counts["killed_while_writing"] += bool(list(verb.out.parent.rglob(".*-????????*")))
        if verb.may_exist:
            state = _state(verb.out)
            counts["lost"] += before is not None and state not in (before, expected[verb.name])
            counts["half_written"] += before is None and state not in ({}, expected[verb.name])
        _finish(verb)
        counts["differ_after_the_next_run"] += _state(verb.out) != expected[verb.name]
        counts["leftovers_after_the_next_run"] += len(list(verb.out.parent.rglob(".*-????????*")))
        _clear(verb.out)
    names = (
        "lost",
        "half_written",
        "differ_after_the_next_run",
        "leftovers_after_the_next_run",
        "killed_while_writing",
    )
    return {"num_kills": sum(killed.values()), "by_verb": dict(killed), **{name: counts[name] for name in names}}


def make_verbs(folder: Path) -> list[Verb]:
    """Make files to work on, and the command lines."""
    from fuzz_files import World

    world = World(folder / "world")
    sound, made = world.sound, folder / "made"
    lines = {
        "merge": ["merge", sound / "hate.safetensors", sound / "violence.safetensors"],
        "convert": ["convert", sound / "loha.safetensors"],
        "protect": ["protect", sound / "hate.safetensors", "--expert", sound / "violence.safetensors"],
        "extract": [
            "extract",
            sound / "tuned.safetensors",
            sound / "base.safetensors",
            "--rank",
            "2",
            "--device",
            "cpu",
        ],
    }
    verbs = []
    for name, words in lines.items():
        out = made / name / "out.safetensors"
        out.parent.mkdir(parents=True)
        verbs.append(Verb(name, [*map(str, words), "--out", str(out), "--overwrite"], out, True))
    prompts = ["dataset", "import", str(sound / "prompts.csv"), "--out", str(made / "import" / "prompts")]
    (made / "import").mkdir()
    return [*verbs, Verb("import", prompts, Path(prompts[-1]), False)]


def _start(verb: Verb, dies_after: int | None = None) -> int:
    """Return the id of a forked process that runs a verb; it kills itself at its `dies_after`th write to a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        from safety_experts import tensor_file
        from safety_experts.commands import run

        if dies_after:
            tensor_bytes, calls = tensor_file.tensor_bytes, 0

            def fatal(tensor):
                nonlocal calls
                calls += 1
                if calls == dies_after % 18:  # six tensors are written, then read back and compared
                    os.kill(os.getpid(), signal.SIGKILL)
                return tensor_bytes(tensor)

            tensor_file.tensor_bytes = fatal
        code = run(verb.arguments)
    finally:
        os._exit(code)


def _run(verb: Verb) -> int:
    return os.waitpid(_start(verb), 0)[1]


def _finish(verb: Verb) -> None:
    if _run(verb):
        raise SystemExit(f"{verb.name} failed: {' '.join(verb.arguments)}")


def _state(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
