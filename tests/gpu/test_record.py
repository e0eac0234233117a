"""A recorded row is on the disk, whatever happens next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.gpu import record
from integration.gpu.context import Context, known
from tests.support.documents import ROOT

SCRIPT = ROOT / "integration" / "gpu" / "record.py"


def read(folder: Path) -> record.Read:
    return record.read(folder / record.FILE)


def test_a_row_comes_back_as_it_was_recorded(tmp_path):
    row = {"step": "decode", "us": 1.5, "shape": "o_proj", "kernel": None}
    record.append(tmp_path / "new", row)
    assert read(tmp_path / "new") == record.Read([row], 0)


def test_numbers_that_json_lacks_become_strings(tmp_path):
    record.append(tmp_path, {"step": "correct", "eager": float("nan")})
    assert read(tmp_path).rows == [{"step": "correct", "eager": "nan"}]


@pytest.mark.parametrize("broken", ['{"step": "dec', "[1, 2]\n", "null", '{"a": 1}'])
def test_a_broken_line_affects_neither_the_row_before_nor_the_row_after(
    tmp_path, broken
):
    record.append(tmp_path, {"step": "one"})
    with (tmp_path / record.FILE).open("a") as file:
        file.write(broken)
    record.append(tmp_path, {"step": "two"})
    found = read(tmp_path)
    assert [row["step"] for row in found.rows] == ["one", "two"]
    assert found.broken == 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from integration.gpu import record
folder = Path(sys.argv[2])
for us in range(3):
    record.append(folder, {"step": "decode", "us": us})
real = os.write
def write(file, line):
    real(file, line[: len(line) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = write
record.append(folder, {"step": "decode", "us": 3})
"""


def test_a_process_killed_in_the_middle_of_writing_loses_only_that_row(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / record.FILE).read_bytes()[-1:] != b"\n"
    found = read(tmp_path)
    assert [row["us"] for row in found.rows] == [0, 1, 2]
    assert found.broken == 1


def test_processes_that_write_at_the_same_time_do_not_mix_their_rows(tmp_path):
    code = KILLED.partition("real =")[0].replace("range(3)", "range(200)")
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    started = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert len(read(tmp_path).rows) == 400 and read(tmp_path).broken == 0


def test_the_command_records_a_failure_that_a_step_could_not_record(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--step", "decode"]
    command += ["--failed", "timed out\nafter 3 s", "--seconds", "3", "--gpu", "H100"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
    (row,) = read(tmp_path).rows
    assert row.pop("date") == record.today()
    assert row == {
        **{"step": "decode", "gpu": "H100", "failed": "timed out after 3 s"},
        "seconds": 3.0,
    }


def step(folder: Path, **options) -> Context:
    return Context(step="decode", folder=folder, device="cpu", **options)


def test_a_failed_case_is_recorded_and_the_next_one_is_tried(tmp_path):
    run = step(tmp_path)
    assert run.attempt({"case": 1}, lambda: 1 / 0) is None  # type: ignore[arg-type]
    assert run.attempt({"case": 2}, lambda: {"us": 2.0}) == {"us": 2.0}
    first, second = read(tmp_path).rows
    assert first["failed"] == "ZeroDivisionError: division by zero"
    assert second["us"] == 2.0 and second["trial"] is True
    assert run.failed(case=1) and not run.failed(case=2)


def test_a_case_without_time_is_skipped_and_recorded_as_skipped(tmp_path):
    run = step(tmp_path, deadline=0.0)
    for case in (1, 2):
        assert run.attempt({"case": case}, lambda: {"us": 1.0}) is None
    assert not (tmp_path / record.FILE).exists()
    run.finish()
    (row,) = read(tmp_path).rows
    assert (row["left_out"], row["first"]) == (2, {"case": 1})


def test_a_resumed_step_skips_recorded_cases(tmp_path):
    run = step(tmp_path)
    run.attempt({"shape": "o_proj", "kernel": "cuda"}, lambda: {"us": 1.0})
    run.attempt({"shape": "o_proj", "kernel": "triton"}, lambda: 1 / 0)  # type: ignore
    run.done = known(run.rows(), "decode")
    for kernel in ("cuda", "triton", "dense"):
        case = {"shape": "o_proj", "kernel": kernel}
        found = run.attempt(case, lambda: {"us": 2.0})
        assert (found is not None) == (kernel == "dense")
    assert run.failed(shape="o_proj", kernel="triton")
    assert not run.failed(kernel="triton")


def test_a_missing_kernel_is_recorded_once(tmp_path):
    run = step(tmp_path)
    for dtype in ("bf16", "bf16", "fp8"):
        run.lacks("cuda", dtype, "needs a GPU")
    assert [row["dtype"] for row in read(tmp_path).rows] == ["bf16", "fp8"]
