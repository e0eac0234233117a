"""Measure the processor seconds of imports, each in fresh processes, in turn.

    python integration/benchmarks/import_time.py

Prints the median of several runs of each statement, and what this package adds to
llm-compressor's import.
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = {
    "nothing": "pass",
    "llmc_attnmask": "import llmc_attnmask",
    "llmcompressor": "import llmcompressor",
    "both": "import llmcompressor, llmc_attnmask",
}
_TIMED = "from time import process_time as t; start = t(); {}; print(t() - start)"


def seconds(statement: str) -> float:
    code = _TIMED.format(statement)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(args.runs):  # in turn, so that other work slows all of them
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    for name, measured in times.items():
        print(f"{name:15}{statistics.median(measured):8.3f} s")
    added = [b - a for a, b in zip(times["llmcompressor"], times["both"], strict=True)]
    print(f"added          {statistics.median(added):8.3f} s to llm-compressor's")


if __name__ == "__main__":
    main()
