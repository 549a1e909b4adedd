"""Datasets survive SIGKILL: import, build (alone and by three processes), judge and review, killed at random.

Every kill is followed by a look at the folder: it opens, every pair that was said to be done is there once, and no line
is unreadable. Then the same work is started again; at the end the folder is, byte for byte, that of work left alone.
Pictures are drawn by the toy world's renderer, so that the time goes to what is tested.

    .venv/bin/python benchmarks/kills_datasets.py [--kills 200]
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safety_experts.evaluation import judging
from safety_experts.evaluation.building import Share, build_dataset, independently
from safety_experts.evaluation.judges import choose_judge
from safety_experts.evaluation.machine import describe_machine
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.exporting import export_dataset
from safety_experts.preferences.importing import import_dataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import render_scene

RESULT = Path(__file__).parent / "results" / "kills_datasets.json"
INFO = DatasetInfo({}, {"renderer": "toy"})
PAIRS = [PromptPair(f"a red circle {n} with thorns", f"a red circle {n}", ("violence",), n) for n in range(90)]
LONGEST_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    report = kill_and_compare(arguments.kills, seed=0)
    result = {"machine": describe_machine("pillow"), "num_kills": arguments.kills} | report
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())
    if any(counts[name] for counts in report.values() for name in ("lost", "twice", "unreadable", "different")):
        raise SystemExit(1)


def kill_and_compare(num_kills: int, seed: int) -> dict[str, dict[str, int]]:
    """Return, by kind of work, the number of kills and what was lost, twice, unreadable or different after them."""
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        whole = build_dataset(PAIRS, root / "whole", INFO, independently(draw))
        export_dataset(whole, "kohya", root / "kohya")
        alone = import_dataset("kohya", root / "kohya", root / "alone").dataset
        _judge(whole.folder, root / "judged")
        judged = PreferenceDataset.open(root / "judged")
        kinds: dict[str, tuple[Callable[[Path], None], PreferenceDataset, int]] = {
            "import": (lambda folder: _import(root / "kohya", folder), alone, 1),
            "build": (_build, whole, 1),
            "build by three processes": (_build_together, whole, 3),
            "judge": (lambda folder: _judge(whole.folder, folder), judged, 1),
        }
        report = {}
        for number, (kind, (work, expected, _)) in enumerate(kinds.items()):
            share = num_kills // (len(kinds) + 1)
            report[kind] = _campaign(work, expected.folder, root / f"work{number}", share, generator)
        report["review"] = _review_campaign(whole, num_kills - sum(r["kills"] for r in report.values()), generator)
        return report


def draw(prompts, seeds):
    scenes = zip(prompts, seeds, strict=True)
    return [render_scene("red", "circle", "thorns" if "thorns" in prompt else None, seed) for prompt, seed in scenes]


def _import(source: Path, folder: Path) -> None:
    import_dataset("kohya", source, folder)


def _build(folder: Path) -> None:
    build_dataset(PAIRS, folder, INFO, independently(draw))


def _build_together(folder: Path) -> None:
    """Three processes that wait for each other; killing the group kills all of them, as torchrun's end does."""
    barrier = multiprocessing.get_context("fork").Barrier(3)
    children = []
    for rank in (1, 2):
        child = os.fork()
        if not child:
            build_dataset(PAIRS, folder, INFO, independently(draw), share=Share(rank, 3, lambda: _wait(barrier)))
            os._exit(0)
        children.append(child)
    build_dataset(PAIRS, folder, INFO, independently(draw), share=Share(0, 3, lambda: _wait(barrier)))
    for child in children:
        os.waitpid(child, 0)


def _judge(source: Path, folder: Path) -> None:
    if not folder.exists():
        shutil.copytree(source, folder.with_name(f"{folder.name}-copy"), dirs_exist_ok=True)
        folder.with_name(f"{folder.name}-copy").rename(folder)
    judging._FLUSH_SECONDS, judging._FLUSH_SHARE = 0.0, 1e9  # a write for every score, so that kills hit writes
    judging.judge_dataset(PreferenceDataset.open(folder), [choose_judge("toy-oracle")])


def _wait(barrier) -> None:
    barrier.wait(60)


def _campaign(
    work: Callable[[Path], None], expected: Path, folder: Path, num_kills: int, generator: random.Random
) -> dict[str, int]:
    counts = dict.fromkeys(("kills", "finished", "lost", "twice", "unreadable", "different"), 0)
    known: set[str] = set()
    round_number = 0
    target = folder / f"{round_number}"
    while counts["kills"] < num_kills:
        if _run_and_kill(lambda target=target: work(target), generator.uniform(0, LONGEST_S)):
            counts["kills"] += 1
            known = _look(target, known, counts)
            continue
        counts["finished"] += 1
        counts["different"] += _content(target) != _content(expected)
        known, round_number = set(), round_number + 1
        target = folder / f"{round_number}"
    _run_and_kill(lambda: work(target), None)
    counts["finished"] += 1
    counts["different"] += _content(target) != _content(expected)
    return counts


def _run_and_kill(work: Callable[[], None], after_s: float | None) -> bool:
    """Do the work in a process group of its own; return whether it was killed before it was done."""
    child = os.fork()
    if not child:
        os.setsid()
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(child, signal.SIGKILL)  # not yet the leader of a group
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the work failed by itself")
    return os.WIFSIGNALED(status)


def _look(folder: Path, known: set[str], counts: dict[str, int]) -> set[str]:
    """Count what a kill did; return the ids that are there."""
    if not (folder / "dataset.json").exists():
        counts["lost"] += len(known)
        return set()
    found: list[str] = []
    for part in [folder, *folder.glob(".shards/*-of-*")]:
        if not (part / "dataset.json").exists():
            continue
        try:
            dataset = PreferenceDataset.open(part)
        except Exception:
            counts["unreadable"] += 1
            continue
        found += [pair.id for pair in dataset.pairs] if part == folder or not known else []
        found += [f"{pair.id} {key}" for pair in dataset.pairs for key in pair.scores]
        ids = (
            [json.loads(line)["id"] for line in (part / "metadata.jsonl").read_bytes().split(b"\n")[:-1]]
            if (part / "metadata.jsonl").exists()
            else []
        )
        counts["twice"] += len(ids) - len(set(ids))
        for pair in dataset.pairs:
            counts["unreadable"] += any(
                not path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in dataset.image_paths(pair)
            )
    everything = set(found) | {
        pair_id
        for part in folder.glob(".shards/*-of-*")
        if (part / "dataset.json").exists()
        for pair_id in PreferenceDataset.open(part).ids
    }
    counts["lost"] += len(known - everything)
    return everything


def _review_campaign(dataset: PreferenceDataset, num_kills: int, generator: random.Random) -> dict[str, int]:
    """A reviewer who says each verdict after it was recorded; the last one may be recorded and not yet said."""
    counts = dict.fromkeys(("kills", "finished", "lost", "twice", "unreadable", "different"), 0)
    ids = list(dataset.ids)
    for _ in range(num_kills):
        reading, writing = os.pipe()

        def review(writing: int = writing) -> None:
            opened = PreferenceDataset.open(dataset.folder)
            for turn in range(10_000):
                verdict = ("accepted", "flipped", "dropped")[turn % 3]
                opened.set_review(ids[turn % len(ids)], verdict)
                os.write(writing, f"{ids[turn % len(ids)]} {verdict}\n".encode())

        _run_and_kill(review, generator.uniform(0, LONGEST_S))
        os.close(writing)
        with open(reading, encoding="utf-8") as said:
            verdicts = dict(line.split() for line in said)
        counts["kills"] += 1
        opened = PreferenceDataset.open(dataset.folder)
        counts["different"] += len(opened.pairs) != len(ids)
        counts["lost"] += max(0, sum(opened.pair(name).review != verdict for name, verdict in verdicts.items()) - 1)
    return counts


def _content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
