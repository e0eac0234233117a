"""Prune one model with every method on the same data and print one table.

    python -m llmc_attnmask.oneshot.compare

Without arguments it prunes the model that the package ships. The rows ``ours`` take the
path that users take: YAML recipe, ``oneshot``, checkpoint on disk, plain transformers.
The baselines prune the same Linears with the same structure on the same windows. If the
model can chat, it also says what becomes of its answers.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.attention_error import DenseAttention
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.oneshot.chat import answer
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.methods import (
    BASELINES,
    Method,
    methods,
    prune_by_magnitude,
    weights,
)
from llmc_attnmask.oneshot.prune import save
from llmc_attnmask.oneshot.recipe import find_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.runlog.wording import duration
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.dialogs import has_template
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

_ERROR_WINDOWS = 128  # evaluation windows for the attention error
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
DENSE = Method("dense", "nothing")


@dataclass(frozen=True)
class Row:
    """One method's measured result."""

    method: Method
    attention_error: float  # relative, mean over layers, evaluation text
    perplexity: float
    zeros: float  # share of zero entries among the weights in the method's scope
    seconds: float  # of pruning
    answers: tuple[str, ...] = ()  # to ``QUESTIONS``, if the method was asked them


class Comparison:
    """A model and the data that every method prunes and evaluates it on.

    :param calibration: int64 [samples, length]
    :param evaluation: int64 [windows, length]
    :param keep: folder where each recipe's checkpoint stays, under the recipe's name;
        by default it is removed after the measurement
    """

    def __init__(
        self,
        model: str | Path,
        calibration: Tensor,
        evaluation: Tensor,
        keep: Path | None = None,
    ):
        self.model, self.keep = model, keep
        self.calibration, self.evaluation = calibration, evaluation
        self.tokenizer = read_tokenizer(model)
        self._dense = load_model(model)
        self._attention = DenseAttention(self._dense, evaluation[:_ERROR_WINDOWS])

    def measure(self, method: Method, questions: Sequence[str] = ()) -> Row:
        """Prune a copy of the model and evaluate it.

        :param questions: to ask it; left out if the model has no chat template
        :raises ValueError: if a baseline cannot prune what is in scope
        """
        if method == DENSE:
            pruned, seconds = self._dense, 0.0
        else:
            pruned, seconds = self._pruned(method)
        entries = weights(pruned, method.scope)
        zeros = sum(int((weight == 0).sum()) for weight in entries)
        errors = self._attention.errors(pruned)
        if not has_template(self.tokenizer):
            questions = ()
        return Row(
            method=method,
            attention_error=sum(errors.values()) / len(errors),
            perplexity=perplexity(pruned, self.evaluation),
            zeros=zeros / sum(map(Tensor.numel, entries)),
            seconds=seconds,
            answers=tuple(answer(pruned, self.tokenizer, each) for each in questions),
        )

    def _pruned(self, method: Method) -> tuple[PreTrainedModel, float]:
        """Return a pruned copy in float32, and the seconds that pruning took."""
        model = load(self.model, dtype="auto")
        modifiers = method.modifiers(model)
        start = time.perf_counter()
        if modifiers:
            compress(model, self.tokenizer, modifiers, self.calibration)
        else:
            prune_by_magnitude(model, method)
        seconds = time.perf_counter() - start
        if method.recipe is None:
            model = model.float().eval().to(self._dense.device)
            model.set_attn_implementation("eager")
            return model, seconds
        with tempfile.TemporaryDirectory() as folder:
            output = (self.keep or Path(folder)) / method.recipe.stem
            return load_model(save(model, self.tokenizer, output)), seconds


def time_left(rows: Sequence[Row], seconds: float, left: Sequence[Method]) -> str:
    """Write about how long the other methods will take.

    :param rows: what has been measured, in ``seconds`` altogether
    """
    known = sum(_COSTS[_kind(row.method)] for row in rows if row.method.calibrated)
    if not left or not known:
        return ""
    pruning = sum(row.seconds for row in rows)
    per_cost = pruning / known
    per_row = (seconds - pruning) / len(rows)
    rest = per_cost * sum(_COSTS[_kind(m)] for m in left) + per_row * len(left)
    return f"; about {duration(rest)} left"


def _kind(method: Method) -> tuple[str, bool]:
    name = "ours" if method.recipe else method.name
    return name, method.scope == "whole block"


# How long pruning takes, by method and whether the whole block is pruned, in multiples
# of what Wanda takes for q and k: measured with the recipes of ``make demo``, and with
# accuracy mode without steps for q and k.
_COSTS = {
    ("dense", False): 0.0,
    ("magnitude", False): 0.0,
    ("magnitude", True): 0.0,
    ("Wanda", False): 1.0,
    ("Wanda", True): 3.0,
    ("SparseGPT", False): 1.2,
    ("SparseGPT", True): 3.4,
    ("ours", False): 7.0,
    ("ours", True): 11.0,
}


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    for column in ("pruned", "method"):
        table.add_column(column, overflow="fold")
    for column in ("perplexity", "gap", "attention error", "zeros", "seconds"):
        table.add_column(column, justify="right")
    for position, row in enumerate(rows):
        if position and row.method.pruned != rows[position - 1].method.pruned:
            table.add_section()
        table.add_row(
            row.method.pruned,
            row.method.name,
            f"{row.perplexity:.3f}",
            f"{row.perplexity - rows[0].perplexity:+.3f}",
            f"{row.attention_error:.5f}",
            f"{row.zeros:.1%}",
            f"{row.seconds:.1f}",
        )
    return table


def _answers(rows: Iterable[Row]) -> Table:
    asked = [row for row in rows if row.answers]
    table = Table(title="answers, the most likely token each time", show_lines=True)
    for column in ("", *QUESTIONS):
        table.add_column(column)
    for row in asked:
        table.add_row(row.method.name, *row.answers)
    return table


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument(
        "--recipe",
        nargs="*",
        default=["attention_2of4"],
        help="recipes that prune q and k: files, or names of shipped ones",
    )
    parser.add_argument(
        "--block-recipe",
        nargs="*",
        default=["block_2of4"],
        help="recipes that prune the whole block",
    )
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=list(BASELINES),
        default=list(BASELINES),
        help="other methods that prune q and k",
    )
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument(
        "--evaluation-windows", type=int, help="the first ones; by default all"
    )
    parser.add_argument("--keep", type=Path, help="folder for the recipes' checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parsed(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipes = [find_recipe(recipe) for recipe in args.recipe]
    of_block = [find_recipe(recipe) for recipe in args.block_recipe]
    block = methods("whole block", of_block, ["SparseGPT"])
    todo = [DENSE, *block, *methods("q and k", recipes, args.baselines)]

    tokenizer = read_tokenizer(args.model)
    calibration = calibration_windows(
        load_texts(args.calibration), tokenizer, args.num_samples, args.max_length
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )[: args.evaluation_windows]
    console = Console()
    start = time.perf_counter()
    rows: list[Row] = []
    with console.status("dense") as status:
        comparison = Comparison(args.model, calibration, evaluation, args.keep)
        for position, method in enumerate(todo, start=1):
            status.update(f"{method.pruned}: {method.name}")
            asked = QUESTIONS if method in (DENSE, *block) else ()
            rows.append(comparison.measure(method, asked))
            elapsed = time.perf_counter() - start
            left = time_left(rows, elapsed, todo[position:])
            console.print(
                f"{position} of {len(todo)}, {duration(elapsed)}: {method.name}{left}",
                style="dim",
                highlight=False,
            )
    console.print(_table(Path(args.model).name, rows))
    if any(row.answers for row in rows):
        console.print(_answers(rows))
    console.print(
        f"calibration {args.calibration}: {len(calibration)} x {args.max_length} "
        f"tokens; evaluation {args.evaluation}: {len(evaluation)} x {args.max_length}"
    )


if __name__ == "__main__":
    main()
