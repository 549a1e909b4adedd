"""`evaluate` survives SIGKILL: killed at random moments and started again, samples.jsonl is that of one straight run.

A model of a few thousand weights draws; each run is killed again and again, also between an image and its line, until
it has had its share, then left to finish. Lines and pictures must be the same bytes.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "evaluation_kills.json"
KILLS_PER_RUN = 10


def main() -> None:
    """Kill, compare, print and write the result."""
    from safety_experts.evaluation.machine import describe_machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT / "tests" / "helpers"))
        report = kill_and_compare(Path(folder), arguments.kills, seed=0)
    result = {
        "claim": "killed at random moments and started again, evaluate ends with the same samples.jsonl and pictures",
        **report,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": describe_machine("diffusers"),
    }
    print(json.dumps(result, indent=2))
    if report["num_equal"] != report["num_runs"]:
        raise SystemExit("a run that went on differs from the straight one")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def kill_and_compare(folder: Path, num_kills: int, seed: int) -> dict:
    """Kill processes of `evaluate` until `num_kills` are dead; return what they came to."""
    command = _command(folder)
    _warm_up()
    straight = folder / "straight"
    seconds = _finish(command, straight)
    expected, moments = _outputs(straight), random.Random(seed)
    killed_at: list[int] = []
    runs = equal = torn = 0
    while len(killed_at) < num_kills:
        runs += 1
        out = folder / f"run{runs}"
        share = min(KILLS_PER_RUN, num_kills - len(killed_at))
        for _ in range(share):
            # The share of the work that is left to one start shrinks, so that every stage is hit.
            child = _start(command, out)
            time.sleep(moments.uniform(0.05, 0.9) * seconds / 2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] != signal.SIGKILL:
                break  # it was done already
            killed_at.append(_lines(out))
            torn += len(list(out.glob("images/*/*/.*.png"))) + len(list(out.glob(".*.jsonl")))
        _finish(command, out)
        equal += _outputs(out) == expected
    return {
        "num_kills": len(killed_at),
        "num_runs": runs,
        "num_equal": equal,
        "num_images": len(expected) - 1,
        "lines_written_when_killed": killed_at,
        "half_written_files_left": torn,
    }


def _command(folder: Path) -> list[str]:
    from small_training import SmallTraining

    small = SmallTraining.create(folder)
    expert = small.train(folder / "expert.safetensors", "steps=2")
    prompts = folder / "prompts.csv"
    lines = [
        f"a {colour} {shape} with thorns,a {colour} {shape},violence"
        for colour in ("red", "green", "blue", "yellow", "pink", "cyan")
        for shape in ("circle", "square", "diamond")
    ]
    prompts.write_text("\n".join(["prompt,safe_prompt,category", *lines]) + "\n", encoding="utf-8")
    words = ["evaluate", "--model", small.checkpoint, "--tokenizer", small.tokenizer, "--expert", expert.path]
    words += ["--prompts", prompts, "--judge", "toy-oracle", "--steps", 2, "--width", 64, "--height", 64]
    return [str(word) for word in [*words, "--batch-size", 3, "--device", "cpu"]]


def _warm_up() -> None:
    """Import what drawing needs, so that a forked process starts at once; nothing may compute before the fork."""
    import diffusers.models.autoencoders.autoencoder_tiny
    import diffusers.models.unets.unet_2d_condition
    import jinja2
    import torch
    import transformers
    from safety_experts.commands import evaluate  # noqa: F401
    from safety_experts.evaluation import drawing, report, results  # noqa: F401

    torch.set_num_threads(1)
    assert diffusers and jinja2 and transformers


def _start(command: list[str], out: Path) -> int:
    """Return the id of a forked process that runs the command into `out`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(out.with_suffix(".log"), "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        from safety_experts.commands import run

        code = run([*command, "--out", str(out)])
    finally:
        os._exit(code)


def _finish(command: list[str], out: Path) -> float:
    start = time.perf_counter()
    if os.waitpid(_start(command, out), 0)[1]:
        raise SystemExit(f"evaluate failed: {out.with_suffix('.log').read_text()}")
    return time.perf_counter() - start


def _lines(out: Path) -> int:
    path = out / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _outputs(out: Path) -> dict[str, bytes]:
    paths = [out / "samples.jsonl", *out.glob("images/*/*/*.png")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


if __name__ == "__main__":
    main()
