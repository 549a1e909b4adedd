"""Generate Preference Pairs survives SIGKILL: the node in a process with ComfyUI's own model, killed at random.

After every kill the dataset is looked at: it opens, no pair that was there before is gone, none is there twice, no line
and no picture is unreadable. Then another process gets the same work. A finished dataset must be, byte for byte, the
one of a process left alone. Processes are forked from one that loaded ComfyUI and the toy checkpoint, for starting a
whole server takes longer than what is tested; tests/comfyui cancel and repeat the node on a real server.

    .venv/bin/python benchmarks/kills_generating.py [--kills 60]
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.preferences.dataset import PreferenceDataset
from safety_experts.preferences.pairs import PromptPair

RESULT = Path(__file__).resolve().parent / "results" / "kills_generating.json"
NUM_PAIRS = 24
PAIRS = [PromptPair(f"a red circle {n} with thorns", f"a red circle {n}", ("violence",), n) for n in range(NUM_PAIRS)]
BAD = ("lost", "twice", "unreadable", "different")


def main() -> None:
    """Kill, look, compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        generate = _load_node(Path(folder))
        counts = kill_and_compare(generate, Path(folder) / "datasets", arguments.kills)
    import comfyui_version

    result = {
        "claim": "killed while it generates pairs: nothing lost, twice or unreadable, and the same dataset in the end",
        "pairs": NUM_PAIRS,
        **counts,
        "seconds": round(time.monotonic() - start),
        "comfyui": comfyui_version.__version__,
        **describe_machine("pillow"),
    }
    print(json.dumps(result, indent=2))
    if any(counts[name] for name in BAD):
        raise SystemExit(1)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _load_node(base: Path) -> Callable[[str], None]:
    """Return what runs the node into a dataset of this name, with ComfyUI in this process and on one thread."""
    sys.path[0] = str(find_comfyui())
    sys.argv[1:] = []
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(base)
    torch.set_num_threads(1)
    import comfy.sd
    from safety_experts.nodes.generating import SafetyExpertsGeneratePairs

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(ensure_toy_checkpoint()))

    def generate(name: str) -> None:
        with torch.inference_mode():
            SafetyExpertsGeneratePairs.execute(
                model, clip, vae, PAIRS, "", "euler", "normal", 2, 3.0, 32, 32, 2, name, "", "off"
            )

    return generate


def kill_and_compare(generate: Callable[[str], None], datasets: Path, num_kills: int) -> dict:
    """Return how many kills there were, of how many datasets, and what came of them."""
    draws = random.Random(0)
    counts: dict = dict.fromkeys(("kills", "kills_in_the_middle", "datasets", *BAD), 0)
    began = time.monotonic()
    _run(lambda: generate("alone"), None)
    seconds = time.monotonic() - began
    expected = _content(datasets / "alone")
    known: list[str] = []
    while True:
        folder = datasets / f"killed{counts['datasets']}"
        is_last = counts["kills"] >= num_kills
        # Short, so that a dataset sees several kills.
        if _run(partial(generate, folder.name), None if is_last else draws.uniform(0, 0.5 * seconds)):
            counts["kills"] += 1
            known = _look(folder, known, counts)
            counts["kills_in_the_middle"] += 0 < len(known) < NUM_PAIRS
            print(counts, flush=True)
            continue
        counts["datasets"] += 1
        counts["different"] += _content(folder) != expected
        known = []
        if is_last:
            return counts


def _run(work: Callable[[], None], kill_after_s: float | None) -> bool:
    """Do the work in a forked process; return whether it was killed before it was done."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the node failed by itself")
    return os.WIFSIGNALED(status)


def _look(folder: Path, known: list[str], counts: dict) -> list[str]:
    """Count what a kill did; return the ids that are there."""
    if not (folder / "dataset.json").exists():
        counts["lost"] += len(known)
        return []
    try:
        dataset = PreferenceDataset.open(folder)
    except Exception:
        counts["unreadable"] += 1
        return []
    ids = list(dataset.ids)
    counts["lost"] += len(set(known) - set(ids))
    metadata = folder / "metadata.jsonl"
    lines = metadata.read_bytes().split(b"\n")[:-1] if metadata.exists() else []
    counts["twice"] += len(lines) - len({json.loads(line)["id"] for line in lines})
    for pair in dataset.pairs:
        counts["unreadable"] += any(
            not path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in dataset.image_paths(pair)
        )
    return ids


def _content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
