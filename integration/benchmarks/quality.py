"""Measure the accuracy of every method on one model, in one table.

    make bench-quality MODEL=... CALIB=... EVAL=... [SEEDS="0 1 2"]

The scope is q/k or the whole block, at 2:4, 50 % and 60 % unstructured. Stock
magnitude, Wanda and SparseGPT run through ``oneshot``, then this package's methods.
Every run has its own process, so that its peak memory is its own. Methods without
randomness run once, the others once per seed, with mean and range.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).parents[2])

from integration.benchmarks.methods import (
    METHODS,
    Case,
    in_own_process,
    pruned,
    shape,
)
from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

ERROR_WINDOWS = 128


@dataclass(frozen=True)
class Run(Case):
    """One run and its data."""

    evaluation: Tensor


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    attention_error: float  # relative, mean over layers, evaluation text
    perplexity: float
    seconds: float  # of pruning
    peak_gb: float  # resident memory of the process until pruning ended


def measure(run: Run) -> Result:
    """Prune and evaluate in this process."""
    found = pruned(run)
    dense = load_model(run.model)
    errors = attention_errors(dense, found.model, run.evaluation[:ERROR_WINDOWS])
    return Result(
        attention_error=sum(errors.values()) / len(errors),
        perplexity=perplexity(found.model, run.evaluation),
        seconds=found.seconds,
        peak_gb=found.peak_gb,
    )


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per method, scope and structure, with all its runs."""
    calibration, evaluation = windows_of(args)
    dense: Result | None = None
    for scope in args.scopes:
        for label in args.structures:
            structure, sparsity = shape(label)
            sparsegpt = None
            for method in args.methods:
                if method == "dense" and dense is not None:
                    continue
                seeds = args.seeds if METHODS.get(method, True) else args.seeds[:1]
                results = [
                    in_own_process(
                        measure,
                        Run(
                            args.model,
                            method,
                            scope,
                            structure,
                            sparsity,
                            seed,
                            calibration,
                            evaluation,
                        ),
                    )
                    for seed in seeds
                ]
                dense = results[0] if method == "dense" else dense
                assert dense is not None
                gaps = [result.perplexity - dense.perplexity for result in results]
                if method == "SparseGPT":
                    sparsegpt = (gaps[0], results[0])
                yield {
                    "scope": scope,
                    "structure": label,
                    "method": method,
                    "gaps": gaps,
                    "gap_ratio": sum(gaps) / len(gaps) / sparsegpt[0]
                    if sparsegpt
                    else None,
                    "error_ratio": _mean(results, "attention_error")
                    / sparsegpt[1].attention_error
                    if sparsegpt
                    else None,
                    "runs": [asdict(result) for result in results],
                }


def windows_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the windows to calibrate and to evaluate on, int64 [windows, length]."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = calibration_windows(
        load_texts(args.calibration), tokenizer, args.num_samples, args.max_length
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )
    return calibration, evaluation


def _mean(results: list[Result], field: str) -> float:
    return sum(getattr(result, field) for result in results) / len(results)


def markdown(row: dict[str, Any]) -> str:
    runs = row["runs"]

    def mean(field: str) -> float:
        return float(sum(run[field] for run in runs) / len(runs))

    gaps = row["gaps"]
    spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
    ratios = [
        "" if row[name] is None else f"{row[name]:.3f}"
        for name in ("error_ratio", "gap_ratio")
    ]
    cells = [
        row["scope"],
        row["structure"],
        row["method"],
        f"{mean('attention_error'):.5f}",
        ratios[0],
        f"{mean('perplexity'):.3f}",
        f"{sum(gaps) / len(gaps):+.3f}{spread}",
        ratios[1],
        f"{mean('seconds'):.0f}",
        f"{mean('peak_gb'):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = [
    "scope",
    "pruned",
    "method",
    "attention error",
    "x SparseGPT's",
    "perplexity",
    "gap to dense (range over seeds)",
    "x SparseGPT's",
    "seconds",
    "peak GB",
]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * 3}{'--:|' * (len(COLUMNS) - 3)}"


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that name a model and its data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--scopes", nargs="+", default=["q/k", "block"])
    parser.add_argument("--structures", nargs="+", default=["2:4", "50 %", "60 %"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(HEADER, flush=True)
    lines, found = [HEADER], []
    for row in rows(args):
        found.append(row)
        lines.append(markdown(row))
        print(lines[-1], flush=True)
        # after every row, so that an interrupted run leaves what it has
        (args.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "quality.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
