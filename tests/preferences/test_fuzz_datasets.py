"""A small part of benchmarks/fuzz_datasets.py, which breaks hundreds."""

import os
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_datasets.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="it makes links and pipes")
def test_sixty_broken_datasets_and_files_give_clear_errors_and_lose_nothing():
    pytest.importorskip("pyarrow")
    report = runpy.run_path(str(SCRIPT))["fuzz"](60, seed=1)
    assert report["failures"] == []
    assert len(report["kinds"]) >= 12 and sum(report["refused"].values()) >= 30
