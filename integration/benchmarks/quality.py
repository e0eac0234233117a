"""Measure the accuracy of every method on one model, in one table.

    make bench-quality MODEL=... CALIB=... EVAL=... [SEEDS="0 1 2"]

The scope is q/k or the whole block, at 2:4, 50 % and 60 % unstructured. Stock
magnitude, Wanda and SparseGPT run through ``oneshot``, then this package's methods.
Every run has its own process, so that its peak memory is its own. Methods without
randomness run once, the others once per seed, with mean and range.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmc_attnmask import (
    ALPSPruningModifier,
    AttentionMatrixPruningModifier,
    MaskedRecoveryModifier,
)
from llmc_attnmask.evaluation.attention_error import attention_errors
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.compare import q_and_k_names
from llmc_attnmask.oneshot.prune import compress
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

STRUCTURES = {"2:4": ("2:4", 0.5), "50 %": ("0:0", 0.5), "60 %": ("0:0", 0.6)}
REST = ["re:.*(v|o|gate|up|down)_proj$"]
ERROR_WINDOWS = 128


@dataclass(frozen=True)
class Run:
    """One run and its data."""

    model: str
    method: str
    scope: str  # "q/k" or "block"
    structure: str
    sparsity: float
    seed: int
    calibration: Tensor
    evaluation: Tensor


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    attention_error: float  # relative, mean over layers, evaluation text
    perplexity: float
    seconds: float  # of pruning
    peak_gb: float  # resident memory of the process until pruning ended


def modifiers(run: Run, model: PreTrainedModel) -> list[Any]:
    """Return the recipe of a method; none for dense and magnitude."""
    shape: dict[str, Any] = {"sparsity": run.sparsity, "mask_structure": run.structure}
    whole = run.scope == "block"
    linears = ["re:.*_proj$"] if whole else q_and_k_names(model)
    light = AttentionMatrixPruningModifier(**shape, seed=run.seed)
    paper = AttentionMatrixPruningModifier(**shape, output_weight=0, seed=run.seed)
    accuracy = AttentionMatrixPruningModifier(
        **shape, update_weights=True, seed=run.seed
    )
    recovery = MaskedRecoveryModifier(seed=run.seed)
    rest = [ALPSPruningModifier(**shape, targets=REST)] if whole else []
    stock = [SparseGPTModifier(**shape, targets=REST)] if whole else []
    recipes: dict[str, list[Any]] = {
        "dense": [],
        "magnitude": [],
        "Wanda": [WandaPruningModifier(**shape, targets=linears)],
        "SparseGPT": [SparseGPTModifier(**shape, targets=linears)],
        "ALPS": [ALPSPruningModifier(**shape, targets=linears)],
        "SparseGPT + recovery": [
            SparseGPTModifier(**shape, targets=linears),
            recovery,
        ],
        "ours light": [light, *stock],
        "ours light, output_weight 0": [paper, *stock],
        "ours accuracy": [accuracy, *rest],
        "ours + recovery": [accuracy, *rest, recovery],
    }
    return recipes[run.method]


METHODS = {  # name -> whether it has randomness
    "dense": False,
    "magnitude": False,
    "Wanda": False,
    "SparseGPT": False,
    "ALPS": False,
    "SparseGPT + recovery": True,
    "ours light": True,
    "ours light, output_weight 0": True,
    "ours accuracy": True,
    "ours + recovery": True,
}


def measure(run: Run) -> Result:
    """Prune and evaluate in this process."""
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype="auto")
    recipe = modifiers(run, model)
    start = time.perf_counter()
    if run.method == "magnitude":
        _magnitude(run, model)
    elif recipe:
        compress(model, tokenizer, recipe, run.calibration)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    dense = load_model(run.model)
    model = model.float().eval().to(dense.device)
    model.set_attn_implementation("eager")
    errors = attention_errors(dense, model, run.evaluation[:ERROR_WINDOWS])
    return Result(
        attention_error=sum(errors.values()) / len(errors),
        perplexity=perplexity(model, run.evaluation),
        seconds=seconds,
        peak_gb=peak,
    )


@torch.no_grad()
def _magnitude(run: Run, model: PreTrainedModel) -> None:
    structure = MaskStructure.parse(run.structure)
    chosen = set(q_and_k_names(model))
    for name, module in model.named_modules():
        whole = run.scope == "block" and name.endswith("_proj")
        if isinstance(module, nn.Linear) and (whole or name in chosen):
            kept = structure.mask(module.weight.abs(), run.sparsity)
            module.weight.masked_fill_(~kept, 0.0)


def in_own_process(function: Callable[[Run], Result], run: Run) -> Result:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, run).result()


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per method, scope and structure, with all its runs."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = calibration_windows(
        load_texts(args.calibration), tokenizer, args.num_samples, args.max_length
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )
    dense: Result | None = None
    for scope in args.scopes:
        for label in args.structures:
            structure, sparsity = STRUCTURES[label]
            sparsegpt = None
            for method in args.methods:
                if method == "dense" and dense is not None:
                    continue
                seeds = args.seeds if METHODS[method] else args.seeds[:1]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scopes", nargs="+", default=["q/k", "block"])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("out"))
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
