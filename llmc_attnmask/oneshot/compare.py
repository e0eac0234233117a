"""Prune one model with every method on the same data and print one table.

    python -m llmc_attnmask.oneshot.compare

Without arguments it prunes the model that the package ships. The rows ``ours`` take the
path that users take: YAML recipe, ``oneshot``, checkpoint on disk, plain transformers.
The baselines prune the same projections with the same structure on the same windows.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from llmc_attnmask.attention.projections import (
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.checkpoint.source import read_tokenizer
from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers import AttentionMatrixPruningModifier
from llmc_attnmask.oneshot.prune import compress, save
from llmc_attnmask.oneshot.recipe import find_recipe, load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

_ROLES: tuple[Role, ...] = ("q", "k")
_ERROR_WINDOWS = 128  # evaluation windows for the attention error


@dataclass(frozen=True)
class Row:
    """One method's measured result."""

    method: str
    attention_error: float  # relative, mean over layers, evaluation text
    perplexity: float
    zeros: float  # share of zero entries in the q and k projections
    seconds: float  # of pruning


def compare(
    model: str | Path,
    recipes: Sequence[Path],
    calibration: Tensor,
    evaluation: Tensor,
    keep: Path | None = None,
) -> Iterator[Row]:
    """Measure dense, magnitude, Wanda, SparseGPT and the recipes, one row each.

    :param recipes: each has one AttentionMatrixPruningModifier; the baselines take the
        sparsity and mask structure of the first
    :param calibration: int64 [samples, length]
    :param evaluation: int64 [windows, length]
    :param keep: folder where each recipe's checkpoint stays, under the recipe's name;
        by default it is removed after the measurement
    """
    tokenizer = read_tokenizer(model)
    dense = load_model(model)
    ours = _attention_modifier(recipes[0])
    structure = MaskStructure.parse(ours.mask_structure)
    sparsity = cast(float, ours.sparsity)
    shared = {
        "sparsity": sparsity,
        "mask_structure": ours.mask_structure,
        "targets": q_and_k_names(dense),
    }

    def by_recipe(recipe: Path) -> Callable[[PreTrainedModel], None]:
        def run(loaded: PreTrainedModel) -> None:
            compress(loaded, tokenizer, load_recipe(recipe).modifiers, calibration)

        return run

    def by_baseline(baseline: Callable) -> Callable[[PreTrainedModel], None]:
        def run(loaded: PreTrainedModel) -> None:
            compress(loaded, tokenizer, [baseline(**shared)], calibration)

        return run

    def by_magnitude(loaded: PreTrainedModel) -> None:
        with torch.no_grad():
            for weight in _weights(loaded):
                weight.masked_fill_(~structure.mask(weight.abs(), sparsity), 0.0)

    def through_disk(pruned: PreTrainedModel, recipe: Path) -> PreTrainedModel:
        with tempfile.TemporaryDirectory() as folder:
            saved = save(pruned, tokenizer, (keep or Path(folder)) / recipe.stem)
            return load(saved)

    methods: dict[str, Callable[[PreTrainedModel], None]] = {
        "dense": lambda loaded: None,
        "magnitude": by_magnitude,
        "Wanda": by_baseline(WandaPruningModifier),
        "SparseGPT": by_baseline(SparseGPTModifier),
    }
    by_name = {
        f"ours, {recipe.stem.removeprefix('attention_')}": recipe for recipe in recipes
    }
    methods |= {name: by_recipe(recipe) for name, recipe in by_name.items()}
    for name, method in methods.items():
        loaded = load(model, dtype="auto")
        start = time.perf_counter()
        method(loaded)
        seconds = time.perf_counter() - start
        pruned = through_disk(loaded, by_name[name]) if name in by_name else loaded
        weights = _weights(pruned)
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(
            map(Tensor.numel, weights)
        )
        pruned = pruned.float().eval().to(dense.device)
        pruned.set_attn_implementation("eager")
        errors = attention_errors(dense, pruned, evaluation[:_ERROR_WINDOWS])
        yield Row(
            method=name,
            attention_error=sum(errors.values()) / len(errors),
            perplexity=perplexity(pruned, evaluation),
            zeros=zeros,
            seconds=seconds,
        )


def q_and_k_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the Linears that are q or k.

    They are for modifiers that prune whole Linears.

    :raises ValueError: if q or k shares a Linear with other projections
    """
    targets = []
    for name, attention in attention_modules(model).items():
        projections = find_projections(attention)
        if not all(projections[role].whole for role in _ROLES):
            raise ValueError(
                f"{name} has q or k in one Linear with other projections, and the "
                "baselines cannot prune a part of a Linear; choose a model with "
                "separate projections"
            )
        targets += [f"{name}.{projections[role].child}" for role in _ROLES]
    return targets


def _attention_modifier(recipe: str | Path) -> AttentionMatrixPruningModifier:
    modifiers = load_recipe(recipe).modifiers
    found = [m for m in modifiers if isinstance(m, AttentionMatrixPruningModifier)]
    if len(found) != 1 or not isinstance(found[0].sparsity, float):
        raise ValueError(
            f"recipe {recipe} has {len(found)} AttentionMatrixPruningModifier; "
            "expected one, with one sparsity for all layers, to compare baselines with"
        )
    return found[0]


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """Return views [rows, columns] of every attention module's q and k projections."""
    weights = []
    for attention in attention_modules(model).values():
        projections = find_projections(attention)
        for role in _ROLES:
            parameter = attention.get_parameter(projections[role].parameter)
            weights.append(projections[role].of(parameter.detach()))
    return weights


def _table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title)
    for column in (
        "method",
        "attention error",
        "perplexity",
        "gap",
        "zeros",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.attention_error:.5f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity - rows[0].perplexity:+.3f}",
            f"{row.zeros:.1%}",
            f"{row.seconds:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=["attention_2of4", "attention_2of4_updated"],
        help="files, or names of recipes that the package ships",
    )
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="folder for the recipes' checkpoints")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    tokenizer = read_tokenizer(args.model)
    calibration = calibration_windows(
        load_texts(args.calibration), tokenizer, args.num_samples, args.max_length
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )
    recipes = [find_recipe(recipe) for recipe in args.recipe]
    console = Console()
    rows = []
    for row in compare(args.model, recipes, calibration, evaluation, args.keep):
        console.print(f"measured {row.method}", style="dim")
        rows.append(row)
    console.print(_table(f"q and k of {args.model}", rows))
    console.print(
        f"calibration {args.calibration}: {len(calibration)} x {args.max_length} "
        f"tokens; evaluation {args.evaluation}: {len(evaluation)} x {args.max_length}"
    )


if __name__ == "__main__":
    main()
