"""Training survives SIGKILL: runs of the command line, killed at random moments and resumed, against one left alone.

Each run is killed again and again until it has had its share of kills, then left to finish. Its first kill comes in the
middle of writing the state, which is hard to hit by chance. Tensors, file and metrics
must be those of the uninterrupted run, bit for bit, and nothing else may stay in the folder.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kills.json"
STEPS, KILLS_PER_RUN = 40, 10


def main() -> None:
    """Kill, compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    start, start_cpu = time.perf_counter(), sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT / "tests" / "helpers"))
        from safety_experts.evaluation.machine import describe_machine
        from small_training import SmallTraining

        report = kill_and_compare(SmallTraining.create(Path(folder)), Path(folder), arguments.kills, seed=0)
    result = {
        "claim": "50 random kills with resume: final tensors equal the uninterrupted run's",
        "num_kills": len(report.killed_at),
        "num_runs": report.num_runs,
        "num_equal": report.num_equal,
        "killed_at_step": report.killed_at,
        "killed_while_writing": report.num_torn,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(sum(os.times()[:4]) - start_cpu, 1),
        **describe_machine("peft"),
    }
    print(json.dumps(result, indent=2))
    if report.num_equal != report.num_runs:
        raise SystemExit("a resumed run differs from the uninterrupted one")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Report:
    """`killed_at`: the last step whose metrics each killed process had written; `num_torn`: temporary files left."""

    num_runs: int
    num_equal: int
    killed_at: list[int]
    num_torn: int


def kill_and_compare(small, folder: Path, num_kills: int, seed: int) -> Report:
    """Kill processes of `train` at random moments until `num_kills` are dead, and compare what they came to.

    Args:
        small: a tests/training/small_training.SmallTraining.
    """
    _warm_up()
    options = ["--set", f"steps={STEPS}", "--set", "save_steps=1", "--set", "ema_decay=0.5", "--set", "schedule=cosine"]
    straight, moments = folder / "straight", random.Random(seed)
    seconds = _run_to_the_end(_command(small, straight, options))  # encodes the dataset as well
    seconds = min(seconds, _run_to_the_end([*_command(small, straight, options), "--overwrite"]))
    expected = _outputs(straight)
    runs = equal = torn = 0
    killed_at: list[int] = []
    while len(killed_at) < num_kills:
        runs += 1
        out = folder / f"run{runs}"
        share, is_first = min(KILLS_PER_RUN, num_kills - len(killed_at)), True
        while share and not (out / "a.safetensors").exists():
            command = _resuming(_command(small, out, options), out)
            if is_first:
                child = _start(command, dies_after_tensors=moments.randrange(1, 2000))
            else:
                child = _start(command)
                time.sleep(moments.uniform(0.1, 0.5) * seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] != signal.SIGKILL:
                break  # it was done already
            share, is_first = share - 1, False
            killed_at.append(_last_step(out))
            torn += len(list(out.glob(".a-*")))
        if not (out / "a.safetensors").exists():
            _run_to_the_end(_resuming(_command(small, out, options), out))
        equal += _outputs(out) == expected
    return Report(runs, equal, killed_at, torn)


def _warm_up() -> None:
    """Import what training needs, so that a forked process starts at once; nothing may compute before the fork."""
    import diffusers.models.autoencoders.autoencoder_tiny
    import diffusers.models.unets.unet_2d_condition
    import peft
    import torch
    import transformers
    from safety_experts.commands import train  # noqa: F401
    from safety_experts.training import trainer  # noqa: F401

    torch.set_num_threads(1)
    assert diffusers and peft and transformers


def _command(small, out: Path, options: list[str]) -> list[str]:
    return [*small.command(out / "a.safetensors", "--device", "cpu", "--metrics", str(out)), *options]


def _resuming(command: list[str], out: Path) -> list[str]:
    return [*command, "--resume"] if (out / "a.resume").exists() else command


def _start(command: list[str], dies_after_tensors: int | None = None) -> int:
    """Return the id of a forked process that runs a command, and kills itself while writing that tensor of a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        from safety_experts.commands import run

        if dies_after_tensors:
            _die_while_writing(dies_after_tensors)
        code = run(command)
    finally:
        os._exit(code)


def _die_while_writing(num_tensors: int) -> None:
    from safety_experts import tensor_file

    tensor_bytes, written = tensor_file.tensor_bytes, 0

    def fatal(tensor):
        nonlocal written
        written += 1
        if written == num_tensors:
            os.kill(os.getpid(), signal.SIGKILL)
        return tensor_bytes(tensor)

    tensor_file.tensor_bytes = fatal


def _run_to_the_end(command: list[str]) -> float:
    start = time.perf_counter()
    if os.waitpid(_start(command), 0)[1]:
        raise SystemExit(f"training failed: {' '.join(command)}")
    return time.perf_counter() - start


def _last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _outputs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


if __name__ == "__main__":
    main()
