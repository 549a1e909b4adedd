"""Memory and time of importing Pick-a-Pic parquet of several sizes, each in a process of its own.

The claim: what is in memory beside a line of text a pair does not grow with the file. Two sizes of file are compared,
with row groups of 100 rows as Hugging Face writes them, and the smaller one also as one row group of everything.

    .venv/bin/python benchmarks/importing.py [--rows 10000 100000]
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

RESULT = Path(__file__).parent / "results" / "importing.json"
SIDE_PX = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _import(*map(Path, arguments.child))
        return
    from safety_experts.evaluation.machine import describe_machine  # brings torch, which the children do without

    runs = [_measure(num_rows, 100) for num_rows in arguments.rows]
    runs.append(_measure(arguments.rows[0], arguments.rows[0]))
    RESULT.write_text(
        json.dumps({"machine": describe_machine("pyarrow", "pillow"), "side_px": SIDE_PX, "runs": runs}, indent=2)
        + "\n"
    )
    print(RESULT.read_text())


def _measure(num_rows: int, rows_per_group: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.parquet"
        _write_rows(file, num_rows, rows_per_group)
        child = [sys.executable, __file__, "--child", str(file), str(Path(folder) / "dataset")]
        report = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        run = {"rows": num_rows, "rows_per_group": rows_per_group, "file_mb": round(file.stat().st_size / 1e6, 1)}
        print(run | report, flush=True)
        return run | report


def _import(file: Path, folder: Path) -> None:
    from safety_experts.preferences.importing import import_dataset

    before_mb = _peak_mb()
    start = time.perf_counter()
    made = import_dataset("pickapic", file, folder)
    seconds = time.perf_counter() - start
    lines_mb = (folder / "metadata.jsonl").stat().st_size / 1e6
    report = {"pairs": len(made.dataset.pairs), "seconds": round(seconds, 1), "metadata_mb": round(lines_mb, 1)}
    print(json.dumps(report | {"peak_mb_before": before_mb, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def _write_rows(path: Path, num_rows: int, rows_per_group: int) -> None:
    """Noise, so that nothing can be compressed away."""
    generator = np.random.default_rng(0)
    schema = pyarrow.schema(
        [
            ("caption", "string"),
            ("jpg_0", "binary"),
            ("jpg_1", "binary"),
            ("label_0", "float64"),
            ("label_1", "float64"),
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, rows_per_group):
            rows = [_row(number, generator) for number in range(start, min(start + rows_per_group, num_rows))]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema), row_group_size=rows_per_group)


def _row(number: int, generator: np.random.Generator) -> dict:
    images = []
    for _ in range(2):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        images.append(buffer.getvalue())
    label = float(number % 2)
    return {
        "caption": f"a red circle with thorns, number {number}",
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": label,
        "label_1": 1 - label,
    }


if __name__ == "__main__":
    main()
