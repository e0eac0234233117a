"""Make tables of what the steps recorded, and write them into RESULTS.md.

    python integration/gpu/summary.py [FILE.jsonl...] [--results RESULTS.md]
    python integration/gpu/summary.py FILE.jsonl --print      # only to the terminal

Without a file, those in ``measured`` are read, which is what RESULTS.md shows. Several
files count as one, in their order; the last of repeated measurements counts. Rows of a
trial on a CPU are skipped, because they are not results. Tables stand between
``<!-- table: NAME -->`` and ``<!-- end of table -->``, one for each GPU.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# This file's folder would shadow modules of other packages, such as `kernels`.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

from integration.gpu.figures import Figures, by_gpu
from integration.gpu.record import Row, read
from integration.gpu.tables import TABLES

RESULTS = Path(__file__).parent / "RESULTS.md"
MEASURED = Path(__file__).parent / "measured"
_TABLE = re.compile(
    r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def read_all(paths: Sequence[Path]) -> tuple[list[Row], list[str]]:
    """Read the rows of all files, and collect remarks about them."""
    rows: list[Row] = []
    remarks = []
    for path in paths:
        found = read(path)
        rows += found.rows
        if found.broken:
            remarks.append(
                f"{path.name}: {found.broken} broken lines are skipped; a step was "
                "killed while it wrote them"
            )
        if trials := sum(bool(row.get("trial")) for row in found.rows):
            remarks.append(
                f"{path.name}: {trials} rows of a trial on a CPU are skipped"
            )
    return rows, remarks


def tables(rows: Sequence[Row], trials: bool = False) -> dict[str, str]:
    """Make every table, by name; each has a part per GPU, under the GPU's name."""
    measured = by_gpu(rows, trials)
    if not measured:
        return {name: make(Figures([])) for name, (_, make) in TABLES.items()}
    return {
        name: "\n\n".join(
            f"**{gpu}**\n\n{make(Figures(own))}" for gpu, own in measured.items()
        )
        for name, (_, make) in TABLES.items()
    }


def written(text: str, made: dict[str, str]) -> str:
    """Replace the tables of a document.

    :raises KeyError: if the document has a marker of an unknown table
    """
    return _TABLE.sub(lambda m: f"{m[1]}{made[m[2]]}\n{m[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--print", action="store_true", help="print only; do not write RESULTS.md"
    )
    parser.add_argument(
        "--trials", action="store_true", help="print the trials on a CPU instead"
    )
    args = parser.parse_args()
    rows, remarks = read_all(args.files or sorted(MEASURED.glob("*.jsonl")))
    made = tables(rows, args.trials)
    for name, (title, _) in TABLES.items():
        print(f"## {title}\n\n{made[name]}\n" if title else f"{made[name]}\n")
    for remark in remarks:
        print(remark)
    if not args.print and not args.trials:
        text = args.results.read_text(encoding="utf-8")
        args.results.write_text(written(text, made), encoding="utf-8")
        print(f"wrote {args.results}")


if __name__ == "__main__":
    main()
