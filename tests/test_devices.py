"""What a model computes in on this machine."""

import os
import subprocess
import sys

import pytest
import torch
from safety_experts.devices import compute_dtype


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_precision_that_is_asked_for_is_taken(precision, dtype):
    assert compute_dtype(torch.device("cpu"), precision) is dtype


@pytest.mark.slow
def test_a_cpu_whose_newer_instructions_are_kept_off_computes_in_float32():
    code = "import torch; from safety_experts.devices import compute_dtype; print(compute_dtype(torch.device('cpu')))"
    kept_off = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    finished = subprocess.run([sys.executable, "-c", code], env=kept_off, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "torch.float32"
