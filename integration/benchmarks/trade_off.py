"""Measure the loss at every size: pruned, planned and quantized, on one model.

    python integration/benchmarks/trade_off.py --model ... --out OUT

``make bench-quality`` runs it after ``quality.py``. Sizes are the bytes of the
decoder's Linears, packed, over those in 16 bits. ``OUT/trade-off.json`` is written row
by row, and rows that it has are not measured again; ``OUT/trade-off.svg`` and ``.md``
show them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).parents[2])

from integration.benchmarks import quality
from integration.benchmarks.methods import METHODS, in_own_process, pruned, shape
from llmc_attnmask.evaluation.perplexity import perplexity
from llmc_attnmask.oneshot.trade_off import packed_size

Row = dict[str, Any]
FILE = "trade-off.json"
DENSE_SHARES = (0.5, 0.25, 0.125)
SPARSITIES = (0.4, 0.5, 0.6, 0.7)
_INT4 = (4 + 16 / 64) / 16  # with a scale for 64 weights
_SPARSE_8BIT = 0.5 * 8 / 16 + 1 / 16  # with a bit for each weight


@dataclass(frozen=True)
class Point:
    """What is measured, and as a part of which line of the picture."""

    line: str
    method: str
    structure: str = "2:4"
    size: float | None = None  # None: what the plan says

    @property
    def name(self) -> str:
        return f"{self.method} {self.structure}"


def points() -> list[Point]:
    """Return every point, line by line."""
    whole = packed_size(0.5)
    unstructured = [(f"{100 * s:g} %", packed_size(s), s) for s in SPARSITIES]
    return [
        Point("SparseGPT, 2:4", "SparseGPT", "2:4", whole),
        Point("Wanda, 2:4", "Wanda", "2:4", whole),
        Point("block_2of4, planned", "block_2of4", "2:4", whole),
        *(
            Point("block_2of4, planned", f"block_2of4, dense_share {share:g}")
            for share in DENSE_SHARES
        ),
        Point("first and last layers dense", "block_2of4, ends 0.25"),
        *(
            Point(f"unstructured, {how}", f"block_unstructured_60, {kind} {s:g}", label)
            for how, kind in (("planned", "sparsity"), ("uniform", "uniform"))
            for label, _, s in unstructured
        ),
        *(
            Point(f"unstructured, {name}", f"block_unstructured_60, {kind} 0.6", "60 %")
            for name, kind in (("OWL", "owl"), ("EvoPress", "evopress"))
        ),
        *(
            Point(f"{method}, unstructured", method, label, size)
            for method in ("SparseGPT", "Wanda")
            for label, size, _ in unstructured
        ),
        Point("quantized only", "W8A8", size=0.5),
        Point("quantized only", "FP8", size=0.5),
        Point("quantized only", "W4A16", size=_INT4),
        Point("2:4 and 8 bits", "block_2of4_w8a8_int8", size=_SPARSE_8BIT),
        Point("2:4 and 8 bits", "block_2of4_fp8", size=_SPARSE_8BIT),
    ]


DENSE = Point("dense", "dense", size=1.0)


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    perplexity: float
    seconds: float  # of pruning, with the plan
    plan: dict[str, Any] | None


def measure(run: quality.Run) -> Result:
    """Prune and evaluate in this process."""
    found = pruned(run)
    return Result(perplexity(found.model, run.evaluation), found.seconds, found.plan)


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per point; those of an earlier run are read from its file."""
    data = quality.windows_of(args)
    known = {row["name"]: row for row in read(args.out / FILE)}
    for point in (DENSE, *points()):
        if point.name in known:
            yield known[point.name]
            continue
        structure, sparsity = shape(point.structure)
        case = (args.model, point.method, "block", structure, sparsity)
        seeds = args.seeds if METHODS.get(point.method, True) else args.seeds[:1]
        results = [
            in_own_process(
                measure, quality.Run(*case, seed, *data, kept=args.out / "kept")
            )
            for seed in seeds
        ]
        row = {
            **asdict(point),
            "name": point.name,
            "runs": [asdict(r) for r in results],
        }
        if point.size is None:
            row["size"] = row["runs"][0]["plan"]["size"]
        yield row


def read(file: Path) -> list[Row]:
    """Return the rows of a file, none if it does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def perplexity_of(row: Row) -> float:
    """Return the mean over seeds."""
    return fmean(run["perplexity"] for run in row["runs"])


def markdown(rows: Iterable[Row]) -> str:
    """Write a table with a row for every point, by size within its line.

    Of several seeds, it has the mean, and the range in brackets.
    """
    by_name = {row["name"]: row for row in rows}
    dense = perplexity_of(by_name.pop(DENSE.name))
    gap = perplexity_of(by_name["SparseGPT 2:4"]) - dense
    lines = [
        "| | method | size | perplexity | rise | x SparseGPT's 2:4 | expected rise |",
        "|---|---|--:|--:|--:|--:|--:|",
        f"| dense | | 1 | {dense:.3f} | | | |",
    ]
    for row in _by_line(by_name.values()):
        found = perplexity_of(row)
        plan = row["runs"][0]["plan"] or {}
        cells = [
            row["line"],
            row["method"] if row["structure"] == "2:4" else row["structure"],
            f"{row['size']:.3f}",
            f"{found:.3f}",
            f"{found / dense - 1:+.1%}",
            _with_range([(run["perplexity"] - dense) / gap for run in row["runs"]]),
            f"{plan['expected_rise']:+.1%}" if "expected_rise" in plan else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _with_range(values: list[float]) -> str:
    mean = f"{fmean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _by_line(rows: Iterable[Row]) -> list[Row]:
    lines = list(dict.fromkeys(point.line for point in points()))
    return sorted(rows, key=lambda row: (lines.index(row["line"]), row["size"]))


def drawn(rows: Iterable[Row]) -> bytes:
    """Draw the rise of the perplexity over the size as SVG, a line for each kind."""
    by_name = {row["name"]: row for row in rows}
    dense = perplexity_of(by_name.pop(DENSE.name))
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trade-off"  # the same file for the same rows
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for line, points_of in groupby(_by_line(by_name.values()), lambda r: r["line"]):
        found = list(points_of)
        rises = [100 * (perplexity_of(row) / dense - 1) for row in found]
        style = "o-" if line.startswith("block_2of4, planned") else ".-"
        axes.plot([row["size"] for row in found], rises, style, label=line)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of the weights, packed, over dense in 16 bits")
    axes.set_ylabel("rise of the perplexity, %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def main() -> None:
    args = quality.options(__doc__).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    left = [point.name for point in (DENSE, *points())]
    earlier = read(args.out / FILE)  # its rows stay until their turn comes
    for row in measured(args):
        rows.append(row)
        left.remove(row["name"])
        waiting = [other for other in earlier if other["name"] in left]
        print(f"{row['line']}, {row['name']}: {perplexity_of(row):.3f}", flush=True)
        content = json.dumps([*rows, *waiting], indent=1)
        (args.out / FILE).write_text(f"{content}\n", encoding="utf-8")
    (args.out / "trade-off.md").write_text(f"{markdown(rows)}\n", encoding="utf-8")
    (args.out / "trade-off.svg").write_bytes(drawn(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
