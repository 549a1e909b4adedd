"""Verbs that are killed leave nothing wrong; benchmarks/verb_kills.py does it two hundred times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "verb_kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its processes")
def test_ten_kills_leave_nothing_wrong(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "10", "--out", str(tmp_path / "kills.json")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "kills.json").read_text())
    assert result["num_kills"] == 10 and set(result["by_verb"]) == {"merge", "convert", "protect", "extract", "import"}
