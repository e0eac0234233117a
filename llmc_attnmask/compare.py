"""Prune one model by every method on the same data and print one table.

    python -m llmc_attnmask.compare

Without arguments it prunes the model that the package ships. The row ``ours`` goes the
whole way a user goes: YAML recipe, ``oneshot``, checkpoint on disk, plain transformers.
The peers prune the same projections with the same structure and calibration windows.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmc_attnmask.attention.projections import (
    Role,
    attention_modules,
    find_projections,
)
from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.data import (
    BUILTIN,
    calibration_windows,
    evaluation_windows,
    load_texts,
)
from llmc_attnmask.evaluation import attention_errors, load_model, perplexity
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.modifiers import AttentionMatrixPruningModifier
from llmc_attnmask.pruning import compress, save
from llmc_attnmask.recipe import load_recipe

_ROLES: tuple[Role, ...] = ("q", "k")
_ERROR_WINDOWS = 128  # the attention error is measured on so many evaluation windows


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
    recipe: str | Path,
    calibration: Tensor,
    evaluation: Tensor,
    keep: Path | None = None,
) -> Iterator[Row]:
    """Rows for dense, magnitude, Wanda, SparseGPT and the recipe, as they are measured.

    :param recipe: a recipe of ours for q and k; the peers take its sparsity and mask
        structure
    :param calibration: int64 [samples, length]
    :param evaluation: int64 [windows, length]
    :param keep: folder to create, in which the recipe's checkpoint stays; by default
        it is measured and removed
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = load_model(model)
    ours = _attention_modifier(recipe)
    structure = MaskStructure.parse(ours.mask_structure)
    sparsity = cast(float, ours.sparsity)
    shared = {
        "sparsity": sparsity,
        "mask_structure": ours.mask_structure,
        "targets": _peer_targets(dense),
    }

    def by_recipe(loaded: PreTrainedModel) -> None:
        compress(loaded, tokenizer, load_recipe(recipe).modifiers, calibration)

    def by_peer(peer: Callable) -> Callable[[PreTrainedModel], None]:
        def run(loaded: PreTrainedModel) -> None:
            compress(loaded, tokenizer, [peer(**shared)], calibration)

        return run

    def by_magnitude(loaded: PreTrainedModel) -> None:
        with torch.no_grad():
            for weight in _weights(loaded):
                weight.masked_fill_(~structure.mask(weight.abs(), sparsity), 0.0)

    def through_disk(pruned: PreTrainedModel) -> PreTrainedModel:
        with tempfile.TemporaryDirectory() as folder:
            saved = save(pruned, tokenizer, keep or Path(folder) / "pruned")
            return AutoModelForCausalLM.from_pretrained(saved, dtype="auto")

    methods: dict[str, Callable[[PreTrainedModel], None]] = {
        "dense": lambda loaded: None,
        "magnitude": by_magnitude,
        "Wanda": by_peer(WandaPruningModifier),
        "SparseGPT": by_peer(SparseGPTModifier),
        "ours": by_recipe,
    }
    for name, method in methods.items():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        start = time.perf_counter()
        method(loaded)
        seconds = time.perf_counter() - start
        pruned = through_disk(loaded) if name == "ours" else loaded
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


def _peer_targets(model: PreTrainedModel) -> list[str]:
    """Names of the Linears that are q or k, for modifiers that prune whole Linears."""
    targets = []
    for name, attention in attention_modules(model).items():
        projections = find_projections(attention)
        if projections["q"].child == projections["k"].child:
            raise ValueError(
                f"{name} has q and k in one Linear, of which the peers cannot prune a "
                "part: choose a model with separate projections to compare them"
            )
        targets += [f"{name}.{projections[role].child}" for role in _ROLES]
    return targets


def _attention_modifier(recipe: str | Path) -> AttentionMatrixPruningModifier:
    modifiers = load_recipe(recipe).modifiers
    found = [m for m in modifiers if isinstance(m, AttentionMatrixPruningModifier)]
    if len(found) != 1 or not isinstance(found[0].sparsity, float):
        raise ValueError(
            f"recipe {recipe} has {len(found)} AttentionMatrixPruningModifier; "
            "expected one, with one sparsity for all layers, to compare with the peers"
        )
    return found[0]


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """The q and k projections of every attention module, views [rows, columns]."""
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
        "--recipe", nargs="+", default=[Path("recipes/attention_2of4.yaml")], type=Path
    )
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="folder for each recipe's checkpoint")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = calibration_windows(
        load_texts(args.calibration), tokenizer, args.num_samples, args.max_length
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )
    console = Console()
    results = {}
    for recipe in args.recipe:
        rows = []
        keep = args.keep / recipe.stem if args.keep else None
        for row in compare(args.model, recipe, calibration, evaluation, keep):
            console.print(f"measured {row.method}", style="dim")
            rows.append(row)
        results[recipe.stem] = [asdict(row) for row in rows]
        console.print(_table(f"q and k of {args.model}, {recipe.stem}", rows))
    console.print(
        f"calibration {args.calibration}: {len(calibration)} x {args.max_length} "
        f"tokens; evaluation {args.evaluation}: {len(evaluation)} x {args.max_length}"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
