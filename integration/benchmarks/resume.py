"""Kill a run at random moments, resume it, and compare with a run that was not killed.

    python integration/benchmarks/resume.py --kills 20

The moments are spread over the duration of a whole run, including start-up and saving.
A resumed run that differs in one byte of one file counts as a failure.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmc_attnmask.checkpoint.io.atomic import PROGRESS
from llmc_attnmask.oneshot.shipped import MODEL_DIR

RECIPE = Path(__file__).parents[2] / "recipes" / "block_2of4_w8a8_int8.yaml"
QUIET = {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
# files that record times and durations, which differ between equal runs
REPORTS = {"README.md", "report.html", "report.json"}


def command(output: Path, recipe: Path) -> list[str]:
    options = ["--recipe", str(recipe), "--output", str(output), "--resume"]
    options += ["--num-samples", "16", "--max-length", "128"]
    program = [sys.executable, "-m", "llmc_attnmask"]
    return [*program, "prune", str(MODEL_DIR), *options]


def start(output: Path, recipe: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(output, recipe),
        env=os.environ | QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(output: Path, recipe: Path) -> None:
    process = start(output, recipe)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run in {output} failed:\n{stderr}")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.iterdir() if path.name not in REPORTS]
    return {path.name: path.read_bytes() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        finish(Path(folder, "uncut"), args.recipe)
        whole = time.perf_counter() - began
        uncut = contents(Path(folder, "uncut"))
        print(f"a whole run takes {whole:.1f} s", flush=True)
        for kill in range(args.kills):
            output = Path(folder, f"killed-{kill}")
            # stratified, so that the moments cover the whole run
            moment = (kill + moments.random()) / args.kills * whole
            process = start(output, args.recipe)
            try:
                process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            steps = len(list((output / PROGRESS).glob("[0-9]*.safetensors")))
            began = time.perf_counter()
            if not (output / "config.json").exists() or (output / PROGRESS).exists():
                finish(output, args.recipe)
            row = {
                "killed_after_s": round(moment, 2),
                "steps_kept": steps,
                "resumed_in_s": round(time.perf_counter() - began, 2),
                "equal": contents(output) == uncut,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    equal = sum(row["equal"] for row in rows)
    print(f"{equal} of {len(rows)} resumed runs are byte-identical to the whole run")
    sys.exit(equal != len(rows))


if __name__ == "__main__":
    main()
