"""Measure every method and recipe on a real model, one line of a file per row.

    make bench-real                                       # out/real.jsonl, hours
    python integration/benchmarks/real.py --only '2:4'    # some of the rows
    python integration/benchmarks/real.py --table out/real.jsonl

Every row is on the disk as soon as it is measured, and a row that the file already has
is not measured again: a run that was cut off goes on when it is started again. A row is
known by what its figures depend on: the model, the modifiers with all their fields, the
calibration, the seed and the texts. Versions of packages are written into the row, but
a new version does not make another row of it; name another file to measure again.

The most important rows come first. ``--list`` names them.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedModel as Model

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).parents[2])

from integration.benchmarks import real_table
from integration.benchmarks.methods import (
    METHODS,
    Case,
    in_own_process,
    modifiers,
    pruned,
    recipe_of,
    shape,
)
from integration.benchmarks.real_data import (
    calibration,
    calibration_name,
    model_digest,
    windows_digest,
)
from integration.benchmarks.real_plan import Plan, left, plans, quantizes
from integration.gpu import record
from llmc_attnmask.evaluation.answers import agreement, reference_answers
from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.runlog.context import described
from llmc_attnmask.runlog.versions import versions
from llmc_attnmask.runlog.wording import duration
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.dialogs import has_template
from llmc_attnmask.text.generation import Dialog
from llmc_attnmask.text.windows import evaluation_windows

FOLDER = Path(".real-model")
MODEL = FOLDER / "SmolLM2-135M-Instruct"
CALIBRATION = FOLDER / "wikipedia-calibration.jsonl"
TEXTS = {
    "wikipedia": str(FOLDER / "wikipedia-evaluation.jsonl"),
    "news": str(FOLDER / "news-evaluation.jsonl"),
    "pydoc": BUILTIN,
}
LENGTH = 512  # tokens of every window
FIRST_WINDOWS, OTHER_WINDOWS = 48, 24  # of the first text, and of each other one
ERROR_WINDOWS = 16  # of the first text, for the attention error


@dataclass(frozen=True)
class Run(Case):
    """One row and its data."""

    texts: dict[str, Tensor]  # name -> int64 [windows, length]; the first one counts
    # the dense model's own answers; none without a chat template
    answers: Sequence[Dialog] = ()


def _attention_error(run: Run, dense: Model, model: Model) -> float | None:
    """Return the relative error, mean over layers; None for a quantized model.

    Attention is replayed with the weights as they are, without what quantization does
    in the model's forward.
    """
    if quantizes(run.method):
        return None
    windows = next(iter(run.texts.values()))[:ERROR_WINDOWS]
    errors = attention_errors(dense, model, windows)
    return sum(errors.values()) / len(errors)


def _agreement(run: Run, dense: Model, model: Model) -> dict[str, float] | None:
    """Compare with the dense model on its own answers; None if it gave none."""
    return asdict(agreement(dense, model, run.answers)) if run.answers else None


# What is measured besides perplexity: name in the row -> function of the run, the dense
# and the pruned model. A further measure goes here, and its column into ``real_table``;
# rows that were measured before do not have it.
MEASURES: dict[str, Callable[[Run, Model, Model], Any]] = {
    "attention_error": _attention_error,
    "answers": _agreement,
}


def measure(run: Run) -> dict[str, Any]:
    """Prune and evaluate in this process."""
    found = pruned(run)
    dense = load_model(run.model)
    return {
        "perplexity": {
            name: perplexity(found.model, windows)
            for name, windows in run.texts.items()
        },
        **{name: take(run, dense, found.model) for name, take in MEASURES.items()},
        "plan": found.plan,
        "seconds": found.seconds,
        "peak_gb": found.peak_gb,
    }


class Benchmark:
    """Rows of one model and one calibration, in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.file = args, Path(args.out)
        self._tokenizer = tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.calibration = calibration(args, tokenizer, LENGTH)
        self.texts: dict[str, Tensor] = {}
        for name, path in args.texts.items():
            texts = load_texts(path, split="evaluation")
            most = OTHER_WINDOWS if self.texts else FIRST_WINDOWS
            self.texts[name] = evaluation_windows(texts, tokenizer, LENGTH)[:most]
        with torch.device("meta"):  # to find names in; its weights are not read
            config = AutoConfig.from_pretrained(args.model)
            self._empty = AutoModelForCausalLM.from_config(config)
        self._model_digest = model_digest(args.model)

    def runs(self, only: str) -> Iterator[tuple[Plan, Run]]:
        """Yield the chosen rows in order; the dense one, which all need, is first."""
        yield self._run(Plan("dense", "", ""), 0)
        for plan in plans():
            if not re.search(only, plan.name):
                continue
            run = self._run(plan, self.args.seeds[0])
            seeds = self.args.seeds if self._random(run[1]) else self.args.seeds[:1]
            yield from (self._run(plan, seed) for seed in seeds)

    def _run(self, plan: Plan, seed: int) -> tuple[Plan, Run]:
        structure, sparsity = shape(plan.structure or "2:4")  # dense has none
        run = Run(
            str(self.args.model),
            plan.method,
            plan.scope,
            structure,
            sparsity,
            seed,
            self.calibration,
            self.texts,
            kept=self.args.keep,
        )
        return plan, run

    def _random(self, run: Run) -> bool:
        return any(hasattr(m, "seed") for m in modifiers(run, self._empty))

    def digest(self, run: Run) -> str:
        """Identify a row by everything that its figures depend on, but the versions."""
        recipe = modifiers(run, self._empty)
        known: dict[str, Any] = {
            "model": self._model_digest,
            "texts": {name: windows_digest(w) for name, w in run.texts.items()},
            "recipe": described(recipe),
            "calibration": windows_digest(run.calibration) if recipe else None,
        }
        if run.method not in METHODS and recipe_of(run.method)[1]:
            known["budget"] = recipe_of(run.method)[1:]
        if run.method == "magnitude":
            known["recipe"] = [run.method, run.scope, run.structure, run.sparsity]
        content = json.dumps(known, sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    @cached_property
    def _answers(self) -> Sequence[Dialog]:
        if not has_template(self._tokenizer):
            return ()
        return reference_answers(load_model(self.args.model), self._tokenizer)

    def rows(self) -> dict[str, record.Row]:
        """Return the rows of the file by digest."""
        if not self.file.exists():
            return {}
        found = record.read(self.file, key="digest")
        if found.broken:
            print(f"{self.file}: {found.broken} lines are not complete rows; left out")
        return {row["digest"]: row for row in found.rows}

    def measure(self, plan: Plan, run: Run, dense: record.Row | None) -> record.Row:
        """Measure one row and write it to the file."""
        start = time.perf_counter()
        found = in_own_process(measure, replace(run, answers=self._answers))
        reference = dense["texts"] if dense else None
        row = {
            "digest": self.digest(run),
            "date": record.today(),
            "model": Path(run.model).name,
            "method": plan.method,
            "scope": plan.scope,
            "structure": plan.structure,
            "calibration": {
                "text": calibration_name(self.args.calibration),
                "windows": len(run.calibration),
                "length": run.calibration.shape[1],
            },
            "seed": run.seed if self._random(run) else None,
            "texts": {
                name: {
                    "windows": len(run.texts[name]),
                    **_losses(value, reference[name] if reference else None),
                }
                for name, value in found.pop("perplexity").items()
            },
            **found,
            "total_seconds": time.perf_counter() - start,
            "versions": versions(),
        }
        record.append_to(self.file, row)
        return row


def _losses(value: float, dense: dict[str, float] | None) -> dict[str, float]:
    before = dense["perplexity"] if dense else value
    return {
        "perplexity": value,
        "gap": value - before,
        "nats": math.log(value / before),
    }


def run_all(benchmark: Benchmark, only: str) -> list[str]:
    """Measure the chosen rows that the file lacks, and say what is left.

    :return: the names of rows that failed; the others were measured nevertheless
    """
    known = benchmark.rows()
    chosen = [(*pair, benchmark.digest(pair[1])) for pair in benchmark.runs(only)]
    dense_digest = chosen[0][2]
    todo = [(plan, run) for plan, run, digest in chosen if digest not in known]
    say = partial(print, flush=True)
    say(f"{benchmark.file}: {left([p for p, _ in todo], list(known.values()))}")
    failed = []
    for position, (plan, run) in enumerate(todo, start=1):
        try:
            row = benchmark.measure(plan, run, known.get(dense_digest))
        except Exception:  # of any kind: one bad row must not cost a night
            if plan.method == "dense":
                raise
            traceback.print_exc()
            failed.append(plan.name)
            continue
        known[row["digest"]] = row
        losses = ", ".join(
            f"{n} {t['perplexity']:.2f}" for n, t in row["texts"].items()
        )
        say(f"{plan.name}: {losses}, {duration(row['total_seconds'])}")
        say(left([p for p, _ in todo[position:]], list(known.values())))
    return failed


def _named(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--calibration", nargs="+", default=[str(CALIBRATION)])
    parser.add_argument(
        "--texts",
        type=_named,
        nargs="+",
        default=list(TEXTS.items()),
        metavar="NAME=PATH",
        help=f"texts to evaluate on; {FIRST_WINDOWS} windows of the first and "
        f"{OTHER_WINDOWS} of each other one",
    )
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="of rows' names, see --list"
    )
    parser.add_argument("--out", type=Path, default=Path("out/real.jsonl"))
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="for models before they are quantized, and for plans' costs: rows with "
        "the same ones share them",
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print a file's table and stop"
    )
    args = parser.parse_args()
    args.texts = dict(args.texts)
    return args


def main() -> None:
    args = _parsed()
    if args.list:
        print("\n".join(p.name for p in plans() if re.search(args.only, p.name)))
    elif args.table:
        print(real_table.written(args.table))
    elif failed := run_all(Benchmark(args), args.only):
        sys.exit(f"error: {len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
