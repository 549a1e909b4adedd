"""A training process that is killed goes on as if nothing had been; benchmarks/kills.py does it fifty times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its processes")
def test_five_kills_one_of_them_while_writing_leave_no_trace(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--out", str(tmp_path / "kills.json")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["num_kills"] == 5 and max(result["killed_at_step"]) > 0
    assert result["killed_while_writing"] >= 1
    assert result["num_equal"] == result["num_runs"]
