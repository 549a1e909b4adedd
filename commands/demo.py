"""`safety-experts demo`: the whole pipeline on the toy world, on a CPU, through a real ComfyUI."""

import argparse
from pathlib import Path

from ..errors import SafetyExpertsError

HELP = "run the whole pipeline on the harmless toy world through a real ComfyUI and report what changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-report"), metavar="DIR", help="default: demo-report")
    parser.add_argument("--fast", action="store_true", help="a few pairs and images: shows that it runs, not how well")
    parser.add_argument("--native", action="store_true", help="train on the MODEL of a loader instead of by checkpoint")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="only write the toy checkpoint, for the example workflows"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.checkpoint:
        from ..demo.toy_checkpoint import write_toy_checkpoint

        print(write_toy_checkpoint(arguments.checkpoint))
        return
    from tqdm import tqdm

    from ..demo.demo_report import write_demo_report
    from ..demo.pipeline import FAST, FULL, run_pipeline

    bar: tqdm | None = None
    shown = ""

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if stage != shown:
            if bar is not None:
                bar.close()
            bar, shown = tqdm(desc=stage, bar_format="{desc}: {percentage:3.0f}% [{elapsed}]"), stage
        assert bar is not None
        bar.total = total
        bar.n = done
        bar.refresh()

    try:
        result = run_pipeline(
            arguments.out,
            ("violence", "hate"),
            FAST if arguments.fast else FULL,
            native=arguments.native,
            on_progress=on_progress,
        )
    finally:
        if bar is not None:
            bar.close()
    page, checks = write_demo_report(arguments.out, result)
    if arguments.json:
        print(page.with_suffix(".json").read_text(encoding="utf-8"), end="")
    else:
        for check in checks:
            print(f"{'kept  ' if check.kept else 'MISSED'} {check.promise}: {check.measured}")
        print(f"report: {page.resolve()}")
    missed = sum(not check.kept for check in checks)
    if missed and not arguments.fast:
        raise SafetyExpertsError(f"{missed} of {len(checks)} promises were missed; see {page}")
