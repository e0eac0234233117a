"""Measure what quantizing a pruned model costs, with and without its masks.

    make bench-quantization MODEL=... CALIB=... EVAL=...

A recipe prunes the model once; every row of the table quantizes a copy of it, in its
own process. "stock" is llm-compressor's GPTQModifier, which fills in pruned entries; it
sets the accuracy to aim for. Calibration sets are disjoint: set i of n has every n-th
window.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmc_attnmask import MaskedGPTQModifier
from llmc_attnmask.evaluation.perplexity import load_model, perplexity
from llmc_attnmask.oneshot.compress import compress
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows, evaluation_windows

RECIPE = Path(__file__).parents[2] / "recipes" / "block_2of4_quick.yaml"
INT4_GROUP_64 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 64,
}
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16, group 64": {
        "config_groups": {"linears": {"targets": ["Linear"], "weights": INT4_GROUP_64}}
    },
    "W8A8": {"scheme": "W8A8", "targets": ["Linear"]},
    "FP8": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]},
}
METHODS = {
    "stock": GPTQModifier,
    "stock, masked afterwards": GPTQModifier,
    "MaskedGPTQModifier": MaskedGPTQModifier,
    "round to nearest": QuantizationModifier,
}
DIVERGENCE_WINDOWS = 64
GUARDED = ("initialize", "update_event", "finalize")  # methods of Modifier


@dataclass(frozen=True)
class Run:
    """One run and its data."""

    pruned: str  # folder
    scheme: str
    method: str
    calibration: Tensor
    evaluation: Tensor


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    broken: int  # pruned entries that are no longer zero
    perplexity: float
    divergence: float  # mean KL divergence from the pruned model, in nats
    seconds: float  # of quantizing


def prune_once(args: argparse.Namespace, calibration: Tensor, output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    compress(model, tokenizer, load_recipe(args.recipe).modifiers, calibration)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def measure(run: Run) -> Result:
    """Quantize and evaluate in this process."""
    tokenizer = AutoTokenizer.from_pretrained(run.pruned)
    model = AutoModelForCausalLM.from_pretrained(run.pruned, dtype="auto")
    masks = {
        module: module.weight != 0
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("_proj")
    }
    modifier = METHODS[run.method](ignore=["re:.*lm_head"], **SCHEMES[run.scheme])
    start = time.perf_counter()
    with masks_unguarded():
        compress(model, tokenizer, [modifier], run.calibration)
    seconds = time.perf_counter() - start
    if run.method == "stock, masked afterwards":
        for module, kept in masks.items():
            module.weight.data.masked_fill_(~kept, 0.0)
    broken = sum(int((m.weight[~kept] != 0).sum()) for m, kept in masks.items())
    pruned = load_model(run.pruned)
    model = model.float().eval().to(pruned.device)
    model.set_attn_implementation("eager")
    return Result(
        broken=broken,
        perplexity=perplexity(model, run.evaluation),
        divergence=divergence(pruned, model, run.evaluation[:DIVERGENCE_WINDOWS]),
        seconds=seconds,
    )


@contextmanager
def masks_unguarded() -> Iterator[None]:
    """Let modifiers break masks within the block, to measure what that gains.

    Importing the package wraps three methods of every modifier to guard the masks; the
    block puts the originals back.
    """
    guarded = {name: getattr(Modifier, name) for name in GUARDED}
    for name, method in guarded.items():
        setattr(Modifier, name, method.__wrapped__)
    try:
        yield
    finally:
        for name, method in guarded.items():
            setattr(Modifier, name, method)


@torch.no_grad()
def divergence(
    reference: PreTrainedModel, model: PreTrainedModel, windows: Tensor
) -> float:
    """Return the mean KL divergence of the next token's distribution, in nats.

    :param windows: int64 [windows, length]
    """
    total = 0.0
    for batch in tqdm(windows.split(16), desc="divergence", leave=False):
        ids = batch.to(reference.device)
        expected, found = (
            m(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            for m in (reference, model)
        )
        total += float((expected.exp() * (expected - found)).sum())
    return total / windows.numel()


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per scheme and method, with its runs; the pruned model first."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sets = args.calibration_sets
    calibration = calibration_windows(
        load_texts(args.calibration),
        tokenizer,
        args.num_samples * sets,
        args.max_length,
    )
    evaluation = evaluation_windows(
        load_texts(args.evaluation, split="evaluation"), tokenizer, args.max_length
    )
    with tempfile.TemporaryDirectory() as folder:
        prune_once(args, calibration[::sets], Path(folder))
        base = perplexity(load_model(folder), evaluation)
        unquantized = Result(0, base, 0.0, 0.0)
        yield {"scheme": "", "method": "pruned only", "runs": [asdict(unquantized)]}
        for scheme in args.schemes:
            stock = None
            for method in args.methods:
                runs = [
                    Run(folder, scheme, method, calibration[i::sets], evaluation)
                    for i in range(1 if method == "round to nearest" else sets)
                ]
                results = [in_own_process(run) for run in runs]
                row: dict[str, Any] = {"scheme": scheme, "method": method}
                row["runs"] = [asdict(result) for result in results]
                row["added"] = [result.perplexity - base for result in results]
                stock = stock or row
                row["added_ratio"] = _mean(row["added"]) / _mean(stock["added"])
                row["divergence_ratio"] = _mean_of(row, "divergence") / _mean_of(
                    stock, "divergence"
                )
                yield row


def in_own_process(run: Run) -> Result:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, run).result()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_of(row: dict[str, Any], field: str) -> float:
    return _mean([run[field] for run in row["runs"]])


def markdown(row: dict[str, Any]) -> str:
    cells = [row["scheme"], row["method"], f"{_mean_of(row, 'broken'):.0f}"]
    cells.append(f"{_mean_of(row, 'perplexity'):.4f}")
    if added := row.get("added"):
        spread = f" ({min(added):+.4f} to {max(added):+.4f})" if len(added) > 1 else ""
        cells += [
            f"{_mean(added):+.4f}{spread}",
            f"{row['added_ratio']:.2f}",
            f"{_mean_of(row, 'divergence'):.6f}",
            f"{row['divergence_ratio']:.2f}",
            f"{_mean_of(row, 'seconds'):.0f}",
        ]
    else:
        cells += [""] * 5
    return "| " + " | ".join(cells) + " |"


COLUMNS = [
    "scheme",
    "method",
    "pruned entries filled in",
    "perplexity",
    "added (range over calibration sets)",
    "x stock's",
    "KL to pruned",
    "x stock's",
    "seconds",
]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * 2}{'--:|' * (len(COLUMNS) - 2)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--calibration", default=BUILTIN)
    parser.add_argument("--evaluation", default=BUILTIN)
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--calibration-sets", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
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
        (args.out / "quantization.json").write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "quantization.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
