"""The kernels touch no byte that is not theirs, and rely on nothing undefined."""

import os
import subprocess
from pathlib import Path

import pytest

import hatch_build
from llmc_attnmask.serving.kernels.cpu import library, machine

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
    objects = []
    for source in sources:
        objects.append(tmp_path / f"{source.stem}.o")
        flags = [*hatch_build.flags_of(source), *SANITIZERS]
        subprocess.run(
            [
                *command,
                *flags,
                '-DATTNMASK_SOURCES=""',
                "-c",
                source,
                "-o",
                objects[-1],
            ],
            check=True,
        )
    # with OpenMP, so that the kernels run on several threads
    link = [*SANITIZERS, *objects, "-o", program, "-fopenmp", "-ldl"]
    subprocess.run([*command, *link], check=True)
    done = subprocess.run(
        program,
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
