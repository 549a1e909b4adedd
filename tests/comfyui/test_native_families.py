"""Families of models on ComfyUI's own code, tiny and random: what benchmarks/families.py checks, for a quick few."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safety_experts.demo.comfyui import find_comfyui

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# A plain UNet, residuals in place, fused query-key-value, five axes, a rotation without a backward pass of its own.
QUICK = ("sd15", "flux1", "z-image", "qwen-image", "cosmos-predict2")


def test_families_train_and_load_in_the_stock_loader():
    command = [sys.executable, str(ROOT / "benchmarks" / "families.py"), "--only", ",".join(QUICK)]
    finished = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COMFYUI_PATH": str(find_comfyui())}, timeout=300
    )
    *found, refused = [json.loads(line[line.index("{") :]) for line in finished.stdout.splitlines() if "{" in line]
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert set(refused) == {"compiled", "nunchaku", "int8"} and all(refused.values())
    assert len(found) == len(QUICK) and all(family["right"] for family in found)
