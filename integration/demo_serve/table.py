"""The table of ``make demo-serve``."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

SHAPE = "Llama-3.2-1B's shape"
COLUMNS = (
    *("model", "type", "weights", "tokens/s, batch 1", "batch 4", "batch 16"),
    *("first token of 512", "memory", "over dense bf16, batch 1"),
)
BATCHES = [f"tokens/s, batch {batch}" for batch in (1, 4, 16)]
FIRST = "first token after 512"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(rows: Sequence[Row]) -> str:
    """Write medians, and the median of the ratios to dense weights of the same type.

    Ratios are those within a round.
    """
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        dense = next(
            other
            for other in rows
            if (other["model"], other["type"], other["weights"])
            == (row["model"], row["type"], "dense")
        )
        cells = [row["model"], row["type"], row["weights"]]
        for what in BATCHES:
            gain = _ratio(row[what], dense[what])
            cells.append(f"{median(row[what]):.1f}{_times(gain, row is dense)}")
        gain = _ratio(dense[FIRST], row[FIRST])
        cells.append(f"{median(row[FIRST]):.2f} s{_times(gain, row is dense)}")
        share = row["bytes"] / dense["bytes"]
        cells.append(f"{row['bytes'] / 1e9:.2f} GB{_times(share, row is dense)}")
        cells.append(f"{_ratio(row[BATCHES[0]], row['reference']):.2f} x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, others, strict=True))


def _times(ratio: float, of_dense: bool) -> str:
    return "" if of_dense else f" ({ratio:.2f} x)"


def answers(rows: Sequence[Row]) -> list[str]:
    """Write the answers of each engine that was asked."""
    return [
        f"{row['weights']}: {answer.strip()}"
        for row in rows
        for answer in row["answers"]
    ]
