"""A small part of benchmarks/fuzz.py, the same cases every time: no traceback, no hang, nothing changed outside."""

import importlib
import os
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links, pipes and alarms of POSIX")
def test_a_part_of_the_campaign_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    fuzz = importlib.import_module("fuzz")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = fuzz.campaign(fuzz.World(tmp_path / "world"), range(7_000_000, 7_000_120), fuzz.run_in_process)
    assert report.findings == []
    assert {0, 2} <= report.exit_codes.keys() and len(report.verbs) == len(fuzz.VERBS)
