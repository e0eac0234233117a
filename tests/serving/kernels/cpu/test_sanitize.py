"""The kernels touch no byte that is not theirs, and rely on nothing undefined."""

import subprocess
from pathlib import Path

import pytest

import hatch_build
from llmc_attnmask.serving.kernels.cpu import library, machine
from tests.support.documents import ROOT

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]


@pytest.mark.slow
@pytest.mark.skipif(
    hatch_build.system_compiler() is None
    or not machine.flags().issuperset({"avx512_bf16", "avx512_vnni", "avx512_vbmi2"}),
    reason="needs a compiler with sanitizers and a CPU that runs the kernels",
)
def test_kernels_pass_the_sanitizers(tmp_path: Path) -> None:
    command = hatch_build.system_compiler()
    assert command is not None
    sources = [
        *library.PATH.parent.glob("*.cpp"),
        Path(__file__).with_name("sanitize.cpp"),
    ]
    program = tmp_path / "sanitize"
    subprocess.run(
        [*command, *hatch_build.FLAGS, *SANITIZERS, *sources, "-o", program, "-ldl"],
        cwd=ROOT,
        check=True,
    )
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
