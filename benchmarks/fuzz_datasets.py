"""Broken datasets and broken files of other formats: clear errors, nothing outside touched, nothing valid lost.

Every case starts from a sound dataset (or an export of it), breaks it by a seeded draw, and lets every verb at it, in
process. A case fails where anything but an error of ours comes out, where reading changed a byte, where writing changed
a line that was whole, where a file outside changed, where an error quotes a prompt, or where it took 10 seconds.

    .venv/bin/python benchmarks/fuzz_datasets.py [--cases 1000] [--seed 0]
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from PIL import Image
from safety_experts.errors import SafetyExpertsError
from safety_experts.preferences.dataset import DatasetInfo, NewPair, PreferenceDataset
from safety_experts.preferences.exporting import export_dataset
from safety_experts.preferences.formats import FORMATS
from safety_experts.preferences.importing import import_dataset
from safety_experts.preferences.inspection import check_dataset
from safety_experts.preferences.leaks import find_leaks
from safety_experts.preferences.merging import merge_datasets
from safety_experts.preferences.pairs import PromptPair
from safety_experts.preferences.splitting import split_dataset

RESULT = Path(__file__).parent / "results" / "fuzz_datasets.json"
MARKER = "zyxwvut"
LIMIT_S = 10.0
JUNK = [
    None, True, -1, 0, 1e308, 10**400, "", " ", "\0", "x" * 5000, "../../outside/x.png", "/etc/passwd", "C:\\x",
    "\ud800", [], [[]], [None], {}, {"a": {}}, "accepted", "NaN", MARKER, [MARKER], {MARKER: MARKER},
    "images", ".", "円", "a\nb",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = fuzz(arguments.cases, arguments.seed)
    from safety_experts.evaluation.machine import describe_machine

    report = {"machine": describe_machine("pillow", "pyarrow", "pydantic"), "seed": arguments.seed} | report
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(RESULT.read_text())
    if report["failures"]:
        raise SystemExit(1)


def fuzz(num_cases: int, seed: int) -> dict:
    """Run the campaign; return counts by kind, how many were refused, the slowest case, and every failure."""
    kinds: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures: list[dict] = []
    slowest_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve()
        sound = _make_sound(root / "sound")
        exports = {}
        for format_name in FORMATS:
            exports[format_name] = root / "exports" / format_name
            export_dataset(sound, format_name, exports[format_name])
        for number in range(num_cases):
            generator = random.Random(f"{seed} {number}")
            case = root / "case"
            outside = root / "outside"
            for folder in (case, outside):
                shutil.rmtree(folder, ignore_errors=True)
            outside.mkdir()
            (outside / "x.png").write_bytes(b"mine, without a line break")
            before = _state(outside)
            if generator.random() < 0.6:
                kind, work = _break_dataset(sound.folder, case, outside, generator)
            else:
                kind, work = _break_export(exports, case, generator)
            kinds[kind] += 1
            start = time.perf_counter()
            try:
                problems = work()
            except Exception:
                problems = [traceback.format_exc(limit=-3)]
            took_s = time.perf_counter() - start
            slowest_s = max(slowest_s, took_s)
            if took_s > LIMIT_S:
                problems.append(f"took {took_s:.1f} s")
            if _state(outside) != before:
                problems.append("a file outside changed")
            if "refused" in problems:
                refused[kind] += 1
            if found := [problem for problem in problems if problem != "refused"]:
                failures.append({"case": number, "kind": kind, "problems": found[:3]})
    return {
        "cases": num_cases,
        "kinds": dict(kinds),
        "refused": dict(refused),
        "slowest_s": round(slowest_s, 2),
        "failures": failures,
    }


def _make_sound(folder: Path) -> PreferenceDataset:
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {"steps": 2, "negative_prompt": MARKER}))
    dataset.add_many(
        NewPair(
            PromptPair(f"{MARKER} circle {n} with thorns", f"{MARKER} circle {n}", ("violence",), n, MARKER, MARKER),
            Image.new("RGB", (8, 8), (n, 200, 0)),
            Image.new("RGB", (8, 8), (n, 0, 200)),
        )
        for n in range(4)
    )
    dataset.update(dataset.pairs[0].id, scores={"toy/chosen": 0.0}, review="flipped")
    return dataset


def _state(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def _break_dataset(sound: Path, case: Path, outside: Path, generator: random.Random):
    shutil.copytree(sound, case)
    kind = generator.choice(["line", "field", "info", "bytes", "image", "link", "pipe or folder"])
    metadata = case / "metadata.jsonl"
    images = sorted((case / "images").iterdir())
    if kind == "line":
        lines = metadata.read_bytes().splitlines(keepends=True)
        place = generator.randrange(len(lines))
        made = [
            b"[" * 50_000,
            b"1" * 5000,
            b"null",
            lines[0],
            b"\xff\xfe{}",
            b"{",
            b"\0" * 50,
            lines[place][:20],
            b"{}",
        ]
        lines.insert(place, generator.choice(made) + generator.choice([b"\n", b"", b"\r\n"]))
        metadata.write_bytes(b"".join(lines))
    elif kind == "field":
        _break_json_lines(metadata, generator)
    elif kind == "info":
        values = json.loads((case / "dataset.json").read_text())
        _break_record(values, generator)
        (case / "dataset.json").write_bytes(_dump(values))
    elif kind == "bytes":
        _break_bytes(generator.choice([metadata, case / "dataset.json", metadata]), generator)
    elif kind == "image":
        path = generator.choice(images)
        if generator.random() < 0.5:
            _break_bytes(path, generator)
        else:
            buffer = io.BytesIO()
            mode, format_name = generator.choice([("CMYK", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("RGB", "GIF")])
            Image.new(mode, generator.choice([(8, 8), (1, 1), (3, 700)])).save(buffer, format=format_name)
            path.write_bytes(buffer.getvalue())
    else:
        path = generator.choice(
            [metadata, case / "dataset.json", case / "images", case / ".lock", generator.choice(images)]
        )
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if kind == "link":
            path.symlink_to(generator.choice([outside / "x.png", outside, outside / "nowhere", path]))
        elif generator.random() < 0.5:
            os.mkfifo(path)
        else:
            path.mkdir()
    return f"dataset: {kind}", lambda: _use_dataset(case, outside.parent / "made", generator)


def _break_export(exports: dict[str, Path], case: Path, generator: random.Random):
    format_name = generator.choice(sorted(exports))
    shutil.copytree(exports[format_name], case)
    files = sorted(path for path in case.rglob("*") if path.is_file())
    tables = [path for path in files if path.suffix in (".csv", ".json", ".jsonl", ".parquet")] or files
    path = generator.choice(tables if generator.random() < 0.7 else files)
    if path.suffix == ".jsonl" and generator.random() < 0.7:
        _break_json_lines(path, generator)
    elif path.suffix == ".json" and generator.random() < 0.7:
        values = json.loads(path.read_text())
        _break_record(generator.choice(values) if isinstance(values, list) else values, generator)
        path.write_bytes(_dump(values))
    elif generator.random() < 0.2:
        path.unlink()
    else:
        _break_bytes(path, generator)
    source = case / "train.csv" if format_name == "coprov2" else case

    def work() -> list[str]:
        made = case.parent / "made"
        shutil.rmtree(made, ignore_errors=True)
        return _attempts([lambda: import_dataset(format_name, source, made)])

    return f"import: {format_name}", work


def _break_json_lines(path: Path, generator: random.Random) -> None:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    _break_record(generator.choice(records), generator)
    path.write_bytes(b"".join(_dump(record) + b"\n" for record in records))


def _break_record(record: dict, generator: random.Random) -> None:
    name = generator.choice([*record, MARKER])
    action = generator.random()
    if action < 0.2:
        record.pop(name, None)
    elif action < 0.3:
        record[f"{name}{MARKER}"] = record.get(name)
    else:
        record[name] = generator.choice(JUNK)


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=_is_escaped(value)).encode("utf-8", "surrogatepass")


def _is_escaped(value: object) -> bool:
    """Half of the files escape what is not ASCII, half do not; which is a matter of the value, not of chance."""
    return len(repr(value)) % 2 == 0


def _break_bytes(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    action = generator.choice(["flip", "cut", "insert", "empty", "repeat"])
    if action == "flip":
        for _ in range(generator.randint(1, 8)):
            if data:
                data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif action == "cut":
        del data[generator.randrange(len(data) + 1) :]
    elif action == "insert":
        place = generator.randrange(len(data) + 1)
        data[place:place] = generator.randbytes(generator.randint(1, 40))
    elif action == "empty":
        data.clear()
    else:
        data.extend(bytes(data))
    path.write_bytes(bytes(data))


def _use_dataset(folder: Path, made: Path, generator: random.Random) -> list[str]:
    for name in ("split", "merged", "export"):
        shutil.rmtree(made.with_name(name), ignore_errors=True)
    before = _state(folder)
    reading = [
        lambda: check_dataset(folder),
        lambda: PreferenceDataset.open(folder).fingerprint(),
        lambda: PreferenceDataset.open(folder).training_pairs(),
        lambda: find_leaks(PreferenceDataset.open(folder), PreferenceDataset.open(folder)),
        lambda: split_dataset(PreferenceDataset.open(folder), made.with_name("split"), {"a": 1.0, "b": 1.0}),
        lambda: merge_datasets([PreferenceDataset.open(folder)], made.with_name("merged")),
        lambda: export_dataset(
            PreferenceDataset.open(folder), generator.choice(sorted(FORMATS)), made.with_name("export")
        ),
    ]
    problems = _attempts(reading)
    if _state(folder) != before:
        problems.append("reading changed the folder")
    metadata = folder / "metadata.jsonl"
    whole = _whole_lines(metadata)
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    new = PromptPair(f"{MARKER} new", f"{MARKER} safe", ("hate",), 99)
    info = DatasetInfo({}, {"steps": 2, "negative_prompt": MARKER})
    problems += _attempts([lambda: PreferenceDataset.create(folder, info).add(new, *images)])
    if whole and _whole_lines(metadata)[: len(whole)] != whole:
        problems.append("writing changed whole lines")
    return problems


def _whole_lines(path: Path) -> list[bytes]:
    if path.is_symlink() or not path.is_file():
        return []
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]


def _attempts(works: list) -> list[str]:
    """Return what was wrong with the errors, and "refused" where there was one of ours."""
    problems: list[str] = []
    for work in works:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                found = work()
            if isinstance(found, list) and found and isinstance(found[0], str):
                said.write("\n".join(found))
        except SafetyExpertsError as error:
            problems.append("refused")
            said.write(str(error))
            if "\n" in str(error) or len(str(error)) > 1000:
                problems.append("an error of several or very long lines")
        if MARKER in said.getvalue():
            problems.append("an error quotes a text")
    return problems


if __name__ == "__main__":
    main()
