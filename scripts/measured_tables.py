"""Write the measured tables of the documents from the benchmarks' results.

    python -m scripts.measured_tables            # rewrites them
    python -m scripts.measured_tables --check    # only names the documents that differ

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. The files
in docs/measurements are unchanged output of ``make bench-quality``, ``make
bench-quantization`` and ``make bench-real``; docs/measurements.md has the conditions.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration.benchmarks import quality, quantization, real_table
from llmc_attnmask.oneshot.shipped import recipes

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
REAL = MEASUREMENTS / "real.jsonl"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
_TABLE = re.compile(
    r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)

_SCOPES = {"q/k": "q and k", "block": "whole block"}
_METHODS = {
    "ours light": "ours, light mode",
    "ours light, output_weight 0": "the same, `output_weight: 0`",
    "ours accuracy": "**ours, `update_weights: true`**",
    "ours + recovery": "**ours with recovery**",
}
# recipe -> where its loss was measured; other recipes were not measured
_LOSSES = {
    "attention_2of4": ("quality-qk", "q/k", "2:4", "ours light"),
    "attention_2of4_updated": ("quality-qk", "q/k", "2:4", "ours accuracy"),
    "attention_unstructured_50": ("quality-qk", "q/k", "50 %", "ours light"),
    "block_2of4_recovered": ("quality-block", "block", "2:4", "ours + recovery"),
}
_QUANTIZED_LOSSES = {
    "block_2of4": ("", "pruned only"),
    "block_2of4_w4a16_gptq": ("W4A16, group 64", "MaskedGPTQModifier"),
    "block_2of4_w8a8_int8": ("W8A8", "MaskedGPTQModifier"),
}

Row = dict[str, Any]


def _label(row: Row) -> str:
    method = str(row["method"])
    return _METHODS.get(method, method)


def read(name: str) -> list[Row]:
    return json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))


def _mean(row: Row, field: str) -> float:
    values = [run[field] for run in row["runs"]]
    return float(sum(values) / len(values))


def _short(number: float, digits: int = 3) -> str:
    """Write a number without the zero before the decimal point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{number:.{digits}f}")


def _bold(text: str, label: str) -> str:
    return f"**{text}**" if label.startswith("**") else text


def _gap(row: Row) -> str:
    """Write the mean over seeds, followed by the range in parentheses."""
    gaps = row["gaps"]
    text = _short(sum(gaps) / len(gaps))
    if len(gaps) > 1:
        text += f" ({_short(min(gaps))} to {_short(max(gaps))})"
    return text


def accuracy() -> str:
    lines = ["| pruned | method | attention error | gap | x SparseGPT's gap |"]
    lines += ["|---|---|--:|--:|--:|"]
    previous = None
    for row in read("quality-qk") + read("quality-block"):
        if row["method"] == "dense":
            continue
        case = (row["scope"], row["structure"])
        stock = _find(("quality-qk", "quality-block"), *case, "SparseGPT")
        ratio = sum(row["gaps"]) / len(row["gaps"]) / stock["gaps"][0]
        label = _label(row)
        cells = [
            f"{_SCOPES[case[0]]}, {case[1]}" if case != previous else "",
            label,
            _short(_mean(row, "attention_error"), 4),
            _gap(row),
            _bold("1" if row is stock or ratio == 1 else f"{ratio:.2f}", label),
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        previous = case
    return "\n".join(lines)


def _find(files: tuple[str, ...], scope: str, structure: str, method: str) -> Row:
    target = (scope, structure, method)
    for row in (row for name in files for row in read(name)):
        if (row["scope"], row["structure"], row["method"]) == target:
            return row
    raise KeyError(f"{files} have no row {target}")


def cost() -> str:
    lines = ["| | seconds | peak memory, imports included | gap |", "|---|--:|--:|--:|"]
    for row in read("cost"):
        if row["method"] == "dense":
            continue
        seconds, peak = _mean(row, "seconds"), _mean(row, "peak_gb")
        label = _label(row).strip("*")
        lines.append(f"| {label} | {seconds:.0f} | {peak:.2f} GB | {_gap(row)} |")
    return "\n".join(lines)


def _as_written(module: Any, name: str) -> str:
    """Write the whole table as the benchmark does."""
    return "\n".join([module.HEADER, *(module.markdown(row) for row in read(name))])


def loss_of(recipe: str) -> str:
    """Write a recipe's gap to the dense model, or that it was not measured."""
    if recipe in _LOSSES:
        file, *target = _LOSSES[recipe]
        row = _find((file,), *target)
        return "+" + _short(sum(row["gaps"]) / len(row["gaps"]), 2)
    if recipe in _QUANTIZED_LOSSES:
        dense = _find(("quality-block",), "block", "2:4", "dense")
        for row in read("quantization"):
            if (row["scheme"], row["method"]) == _QUANTIZED_LOSSES[recipe]:
                gap = _mean(row, "perplexity") - _mean(dense, "perplexity")
                return "+" + _short(gap, 2)
    return "not measured"


def real(file: Path) -> str:
    """Write the rows of ``make bench-real``."""

    def label(method: str) -> str:
        return f"`{method}`" if method in recipes() else _METHODS.get(method, method)

    return real_table.markdown(real_table.read(file), label)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "cost": cost,
    "quality-qk": lambda: _as_written(quality, "quality-qk"),
    "quality-block": lambda: _as_written(quality, "quality-block"),
    "quality-cost": lambda: _as_written(quality, "cost"),
    "shipped-block-2of4": lambda: _as_written(quality, "shipped-block-2of4"),
    "shipped-block-60": lambda: _as_written(quality, "shipped-block-60"),
    "quantization": lambda: _as_written(quantization, "quantization"),
}
if REAL.exists():
    TABLES["real"] = lambda: real(REAL)


def written(text: str) -> str:
    """Rewrite a document's tables, and the losses next to its recipes."""
    text = _TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)
    return re.sub(
        r"(<!-- loss (\w+) -->).*?(<!---->)",
        lambda m: m[1] + loss_of(m[2]) + m[3],
        text,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = False
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            print(document.relative_to(ROOT))
            stale = True
            if not check:
                document.write_text(new, encoding="utf-8")
    sys.exit(1 if stale and check else 0)


if __name__ == "__main__":
    main()
