"""The attention kernels, compiled for GPUs: the resources that they take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
REGISTERS = 168  # three programs of 128 threads on a multiprocessor's 65,536 registers
SHARED = 163 * 1024 // 3  # of what an A100 allows


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_spill_no_registers_and_three_programs_fit(capability):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kernels.compile_fused", str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 12
    for name, (registers, local, shared) in found.items():
        assert 0 < registers <= REGISTERS, name
        assert local == 0, name
        assert 0 < shared <= SHARED, name
