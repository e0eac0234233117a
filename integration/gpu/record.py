"""Write figures to disk as soon as they are known, as one JSON object per line.

    python integration/gpu/record.py OUT --step NAME --failed WHY [--seconds N]

appends a row for a step that failed without recording one. It imports nothing heavy,
because the shell scripts call it between two steps.
"""

import argparse
import datetime
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
_EVERYWHERE = ("step", "date", "gpu", "trial", "failed")

Row = dict[str, Any]


def append(folder: Path, row: Row) -> None:
    """Add a row to the folder's file, as ``append_to`` does."""
    append_to(folder / FILE, row)


def append_to(path: Path, row: Row) -> None:
    """Add a row to a file; when this returns, it is on the disk.

    Several processes may append at once. If a killed process left part of a line, that
    line is ended first, so that it damages no other.

    :param path: created with its folder if it does not exist
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"
    if _ends_within_a_line(path):
        line = "\n" + line
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())  # one call, which O_APPEND keeps whole
        os.fsync(file)
    finally:
        os.close(file)


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _plain(value: Any) -> Any:
    # JSON has no NaN and no infinity
    return (
        str(value) if isinstance(value, float) and not math.isfinite(value) else value
    )


@dataclass(frozen=True)
class Read:
    """The content of a file."""

    rows: list[Row]
    broken: int  # lines that are not a row, because a process was killed while writing


def read(path: Path, key: str = "step") -> Read:
    """Read the rows of a file that were written completely.

    :param key: what every row has
    :raises FileNotFoundError: if there is no such file
    """
    rows: list[Row] = []
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and key in row:
            rows.append(row)
        else:
            broken += 1
    return Read(rows, broken)


def case(row: Row, *others: str) -> Row:
    """Return a row without the entries that every row has: its case and its figures.

    :param others: further entries to drop
    """
    return {k: v for k, v in row.items() if k not in _EVERYWHERE and k not in others}


def today() -> str:
    return datetime.date.today().isoformat()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", required=True)
    parser.add_argument("--failed", required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--gpu", help="its name")
    parser.add_argument(
        "--trial", action="store_true", help="the row of a trial, as with step.py --cpu"
    )
    args = parser.parse_args()
    row: Row = {"step": args.step, "date": today(), "gpu": args.gpu or None}
    if args.trial:
        row["trial"] = True
    row["failed"] = " ".join(args.failed.split())[:500]
    if args.seconds is not None:
        row["seconds"] = args.seconds
    append(args.folder, row)


if __name__ == "__main__":
    main()
