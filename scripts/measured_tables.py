"""Write the documents' measured tables and pictures from the benchmarks' results.

    python -m scripts.measured_tables            # rewrites them
    python -m scripts.measured_tables --check    # only names the documents that differ

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. The files
in docs/measurements are unchanged output of ``make bench-quality``, ``make
bench-quantization``, ``make bench-real``, ``make bench-cpu`` and ``make demo-serve``;
docs/measurements.md has the conditions.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from integration.benchmarks import (
    cpu_kernels,
    quality,
    quantization,
    real_table,
    trade_off,
)
from integration.demo_serve import table as demo_serve
from llmc_attnmask.oneshot.shipped import recipes

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
REAL = MEASUREMENTS / "real.jsonl"
SECOND = MEASUREMENTS / "second.jsonl"
CPU_KERNELS = MEASUREMENTS / "cpu-kernels.jsonl"
DEMO_SERVE = MEASUREMENTS / "demo-serve.jsonl"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
_TABLE = re.compile(
    r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)

_METHODS = {
    "ours light": "ours, light mode",
    "ours light, output_weight 0": "the same, `output_weight: 0`",
    "ours accuracy": "**ours**",
    "ours + recovery": "**ours with recovery**",
}
# recipe -> scope, structure and method of its rows, where these are others
_ROWS = {
    "attention_2of4_light": ("q/k", "2:4", "ours light"),
    "attention_2of4": ("q/k", "2:4", "ours accuracy"),
    "block_unstructured_60": ("block", "60 %", "block_unstructured_60, sparsity 0.6"),
}
_LOSS_TEXT = "wikipedia"
_LOSS_CALIBRATION = {
    "text": "wikipedia-calibration.jsonl",
    "windows": 64,
    "length": 512,
}

Row = dict[str, Any]


def _label(row: Row) -> str:
    method = str(row["method"])
    return _METHODS.get(method, method)


def read(name: str) -> list[Row]:
    return json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))


def _as_written(module: Any, name: str) -> str:
    """Write the whole table as the benchmark does."""
    return "\n".join([module.HEADER, *(module.markdown(row) for row in read(name))])


def loss_of(recipe: str) -> str:
    """Write by how much a recipe raises perplexity, or that it was not measured."""
    target = _ROWS.get(recipe, ("block", "2:4", recipe))
    for row in real_table.read(REAL) if REAL.exists() else []:
        known = (row["scope"], row["structure"], row["method"])
        if known == target and row["calibration"] == _LOSS_CALIBRATION:
            return f"{row['texts'][_LOSS_TEXT]['gap']:+.2f}"
    return "not measured"


def _real_label(method: str) -> str:
    recipe, separator, budget = method.partition(", ")  # that it was planned for
    if recipe in recipes():
        return f"`{recipe}`{separator}{budget.replace('_', ' ')}"
    return _METHODS.get(method, method)


def real(file: Path) -> str:
    """Write the rows of ``make bench-real``."""
    return real_table.markdown(real_table.read(file), _real_label)


def real_summary(file: Path) -> str:
    """Write what matters of the rows of ``make bench-real``."""
    return real_table.summary(real_table.read(file), _real_label)


def size_against_loss(file: Path) -> str:
    """Write the rows of ``trade_off.py``."""
    return trade_off.markdown(trade_off.read(file))


TABLES: dict[str, Callable[[], str]] = {
    "quality-qk": lambda: _as_written(quality, "quality-qk"),
    "quality-block": lambda: _as_written(quality, "quality-block"),
    "quality-cost": lambda: _as_written(quality, "cost"),
    "shipped-block-2of4": lambda: _as_written(quality, "shipped-block-2of4"),
    "shipped-block-60": lambda: _as_written(quality, "shipped-block-60"),
    "quantization": lambda: _as_written(quantization, "quantization"),
}
TABLES["demo-serve"] = lambda: demo_serve.markdown(demo_serve.read_rows(DEMO_SERVE))
TABLES["cpu-kernels"] = lambda: cpu_kernels.markdown(cpu_kernels.read_rows(CPU_KERNELS))
TABLES["cpu-kernels-summary"] = lambda: cpu_kernels.markdown(
    cpu_kernels.read_rows(CPU_KERNELS), tokens=[1, 4, 16, 512]
)
TABLES["cpu-bandwidth"] = lambda: cpu_kernels.bandwidth(
    cpu_kernels.read_rows(CPU_KERNELS)
)
TRADE_OFFS = {  # name of the table -> file of ``trade_off.py``, which is drawn as well
    path.stem: path for path in sorted(MEASUREMENTS.glob("trade-off-*.json"))
}
for _name, _path in TRADE_OFFS.items():
    TABLES[_name] = partial(size_against_loss, _path)
if REAL.exists():
    TABLES["real"] = lambda: real(REAL)
    TABLES["real-summary"] = lambda: real_summary(REAL)
if SECOND.exists():
    TABLES["second"] = lambda: real(SECOND)


def written(text: str) -> str:
    """Rewrite a document's tables, and the losses next to its recipes."""
    text = _TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)
    return re.sub(
        r"(<!-- loss (\w+) -->).*?(<!---->)",
        lambda m: m[1] + loss_of(m[2]) + m[3],
        text,
    )


def pictures() -> dict[Path, bytes]:
    """Draw every picture: its file -> SVG."""
    return {
        ROOT / "docs" / "assets" / f"{name}.svg": trade_off.drawn(trade_off.read(path))
        for name, path in TRADE_OFFS.items()
    }


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
    for picture, drawn in pictures().items():
        if not picture.exists() or picture.read_bytes() != drawn:
            print(picture.relative_to(ROOT))
            stale = True
            if not check:
                picture.write_bytes(drawn)
    sys.exit(1 if stale and check else 0)


if __name__ == "__main__":
    main()
