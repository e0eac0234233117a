"""The shell scripts: steps that time out, fail or are killed leave others intact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.gpu import record
from tests.support.documents import ROOT

GPU = ROOT / "integration" / "gpu"
STEPS = {
    "measure_kernels.sh": (
        *("machine", "compile", "correct", "cusparselt", "decode", "prefill"),
        *("blocks", "attention", "prune", "profile"),
    ),
    "measure_serving.sh": (
        *("machine", "vllm", "decode-again", "checkpoint", "engine-dense"),
        *("engine-sparse", "checkpoint-fp8", "engine-dense-8", "engine-sparse-8"),
    ),
}
# stands in for step.py: a step does what its name says
STEP = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from integration.gpu import record
name, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
record.append(out, {{"step": name, "gpu": None, "date": "2026-01-01", "us": 1.0,
                     "given": sys.argv[2:], "path": os.environ["PYTHONPATH"]}})
print("printed by", name, flush=True)
if name == "slow":
    time.sleep(60)
if name == "failing":
    sys.exit("nothing works")
if name == "killed":
    with (out / record.FILE).open("a") as file:
        file.write('{{"step": "kil')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def bash(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *command],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", STEPS)
def test_without_a_gpu_the_script_names_its_steps_and_ends_well(script, tmp_path):
    done = bash([str(GPU / script), str(tmp_path / "out")])
    assert done.returncode == 0 and not done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("No CUDA GPU on this machine.")
    named = [line.split()[0] for line in lines]
    assert [name for name in named if name != "unpack"] == list(STEPS[script])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("script", "call"), [("kernels", 300), ("serving", 330)])
def test_a_script_ends_within_its_total_time(script, call):
    text = (GPU / f"measure_{script}.sh").read_text()
    total = int(text.partition("TOTAL_SECONDS:-")[2].partition("}")[0])
    assert total + 3 < call  # a step that times out is killed 3 s later


@pytest.fixture
def run(tmp_path):
    """Run a script of steps; return its output and the rows."""
    (tmp_path / "fake.py").write_text(STEP.format(root=str(ROOT)))
    out = tmp_path / "out"

    def run(*steps: str, total: int = 60) -> tuple[str, list[dict], int]:
        script = tmp_path / "measure.sh"
        lines = ["set -euo pipefail", f". {GPU / 'steps.sh'}"]
        lines += [f"begin {out} {total} --cpu", *steps, "finish"]
        script.write_text("\n".join(lines))
        done = bash([str(script)], STEP=str(tmp_path / "fake.py"), PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        found = record.read(out / record.FILE)
        return done.stdout, found.rows, found.broken

    return run


def test_steps_that_time_out_fail_or_are_killed_lose_nothing_else(run):
    printed, rows, broken = run(
        "step first 20 1 good",
        "step second 2 1 slow",
        "step third 20 1 failing",
        "step fourth 20 1 killed",
        "step fifth 20 1 run no-such-command",
        "step last 20 1 good --tokens 1 8",
    )
    assert [row["step"] for row in rows if "us" in row] == [
        *("good", "slow", "failing", "killed", "good")
    ]
    assert broken == 1
    failed = {row["step"]: row["failed"] for row in rows if "failed" in row}
    assert failed.keys() == {"second", "third", "fourth", "fifth"}
    assert failed["second"].startswith("timed out after")
    assert failed["third"] == "exit code 1: nothing works"
    assert failed["fourth"].startswith("killed after")
    assert failed["fifth"].startswith("exit code 127: ")
    assert rows[-1]["given"][:2] == ["--tokens", "1"]
    assert rows[-1]["given"][-3:] == ["--seconds", "20", "--cpu"]
    assert all(row["trial"] for row in rows if "failed" in row)
    assert "1 broken lines are skipped" in printed
    assert "| fourth |" in printed  # in the table of failures


def test_a_step_that_does_not_fit_in_the_remaining_time_is_not_started(run):
    _, rows, _ = run(
        "step first 20 1 good", "step second 30 10 good", "step third 9 1 good", total=9
    )
    assert [row["step"] for row in rows if "us" in row] == ["good", "good"]
    (missing,) = [row for row in rows if "failed" in row]
    assert missing["step"] == "second"
    assert "it needs 10" in missing["failed"]


def test_a_step_may_have_a_site_folder_that_the_next_one_does_not_have(run):
    _, rows, _ = run("step one 9 1 site=/a/site good", "step two 9 1 good")
    assert [row["path"] for row in rows] == ["/a/site", ""]


def test_the_output_of_steps_is_in_the_log(run, tmp_path):
    printed, _, _ = run("step one 9 1 good")
    assert "printed by good" in (tmp_path / "out" / "log.txt").read_text()
    assert (tmp_path / "out" / "summary.md").read_text().strip() in printed
    assert Path(GPU / "measure_kernels.sh").stat().st_mode & 0o111
