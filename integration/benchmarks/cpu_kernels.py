"""Time the sparse CPU kernels against vLLM's own dense ones; runs in .venv-serving.

    make bench-cpu

The rival is whatever vLLM would serve a dense layer of the same type with on this
machine, weights prepacked; INT8 includes the quantization of tokens, on both sides.
Each weight is there several times, more often than the last-level cache holds, so that
weights come from memory as they do while serving. Dense and sparse take turns, and
ratios are medians over the turns. A row per type, shape and number of tokens is
appended to OUT/cpu-kernels.jsonl.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cpu import weights as forms
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (2048, 8192), (8192, 2048)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 512]
MANY = {(4096, 4096): [1024, 4096]}  # tokens beside TOKENS
KINDS = {"2:4": None, "50 %": 0.5, "60 %": 0.6, "70 %": 0.7}  # share of zeros
COLD = 160 << 20  # bytes of all copies of a sparse weight, at least

Row = dict[str, Any]
Call = Callable[[Tensor], Tensor]


def weight_of(rows: int, columns: int, kind: str, int8: bool, seed: int) -> Tensor:
    """Return a random weight with the zeros of a kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    share = KINDS[kind]
    if share is None:
        groups = noise.view(-1, 4)
        groups.scatter_(1, groups.abs().argsort(-1)[:, :2], 0)
    else:
        sample = noise.flatten()[: 1 << 20].abs()
        noise[noise.abs() < sample.quantile(share)] = 0
    if int8:
        rounded = (noise * 28).round().clamp(-127, 127)
        rounded[(rounded == 0) & (noise != 0)] = 1  # as many zeros as before
        return rounded.to(torch.int8)
    return noise.bfloat16()


def dense_calls(weights: list[Tensor]) -> list[Call]:
    """Return what vLLM would serve the weights with, stored dense."""
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors,
        schemes,
    )

    from llmc_attnmask.serving.dense_twin import DenseTwin

    layer: Any = torch.nn.Module()
    if weights[0].dtype == torch.bfloat16:
        stock: Any = UnquantizedLinearMethod()
        return [DenseTwin(layer, stock, weight.clone(), None) for weight in weights]
    layer.scheme = schemes.CompressedTensorsW8A8Int8("channel", False, True)
    layer.scheme.kernel = init_int8_linear_kernel(
        is_channelwise=True,
        is_static_input_scheme=False,
        input_symmetric=True,
        module_name="benchmark",
    )
    stock = compressed_tensors.CompressedTensorsLinearMethod(None)
    scale = torch.full((len(weights[0]),), 0.01, dtype=torch.float32)
    return [DenseTwin(layer, stock, weight.clone(), scale) for weight in weights]


def sparse_calls(weights: list[Tensor], kind: str) -> tuple[list[Call], int]:
    """Return the sparse kernel's calls, and the bytes that one reads."""
    make = forms.two_of_four if kind == "2:4" else forms.any_mask
    size = 0
    calls: list[Call] = []
    for weight in weights:
        form = make(weight)
        size = form.nbytes
        if weight.dtype == torch.bfloat16:
            calls.append(partial(_call, form))
        else:
            scale = torch.full((len(weight),), 0.01, dtype=torch.float32)
            calls.append(partial(_int8_call, form, scale, weight.sum(1).int()))
    return calls, size


def _call(form: forms.Weight, x: Tensor) -> Tensor:
    return cpu_sparse_linear(x, *form)


def _int8_call(form: forms.Weight, scale: Tensor, sums: Tensor, x: Tensor) -> Tensor:
    from vllm import _custom_ops as ops

    rounded, scales, _ = ops.onednn_scaled_int8_quant(x)
    return cpu_sparse_linear(rounded, *form, scale, sums, scales)


def read_bandwidth(seconds: float = 1.0) -> float:
    """Return how many bytes per second a plain sum over memory reads."""
    numbers = torch.ones(1 << 25, dtype=torch.int64)
    taken = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - start)
    return numbers.nbytes / statistics.median(taken)


def compare(
    rows: int, columns: int, int8: bool, tokens: list[int], rounds: int
) -> Iterator[Row]:
    """Time one shape, and yield a row for every number of tokens."""
    itemsize = 1 if int8 else 2
    copies = max(2, -(-COLD // (rows * columns * itemsize * 4 // 10)))
    calls: dict[str, list[Call]] = {}
    sizes = {"dense": rows * columns * itemsize}
    for kind in KINDS:
        made = [weight_of(rows, columns, kind, int8, seed) for seed in range(2)]
        calls[kind], sizes[kind] = sparse_calls(
            [made[number % 2] for number in range(copies)], kind
        )
    calls["dense"] = dense_calls([made[number % 2] for number in range(copies)])
    read = read_bandwidth()
    for count in tokens:
        x = torch.randn(count, columns).bfloat16()
        used = copies if count < 256 else 2
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds if count < 256 else max(3, rounds // 3)):
            for kind, each in calls.items():
                start = time.perf_counter()
                for call in each[:used]:
                    call(x)
                times[kind].append((time.perf_counter() - start) / used)
        row: Row = {
            "type": "int8" if int8 else "bf16",
            "shape": [rows, columns],
            "tokens": count,
            "threads": torch.get_num_threads(),
            "read": read,
        }
        for kind, taken in times.items():
            ratios = [d / t for d, t in zip(times["dense"], taken, strict=True)]
            row[kind] = {
                "seconds": statistics.median(taken),
                "bytes": sizes[kind],
                "ratio": statistics.median(ratios),
                "ratios": sorted(ratios)[len(ratios) // 4 :: max(1, len(ratios) // 2)],
            }
        yield row


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def markdown(rows: list[Row], tokens: Sequence[int] = ()) -> str:
    """Write how many times as fast as dense: from the worst shape to the best.

    :param tokens: the numbers of tokens to write; by default, all
    """
    lines = [
        "| type | tokens | " + " | ".join(KINDS) + " |",
        "|---|--:|" + "--:|" * len(KINDS),
    ]
    for name in ("bf16", "int8"):
        for count in tokens or sorted({row["tokens"] for row in rows}):
            found = [r for r in rows if (r["type"], r["tokens"]) == (name, count)]
            if not found:
                continue
            cells = []
            for kind in KINDS:
                ratios = [row[kind]["ratio"] for row in found]
                low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
                cells.append(low if low == high else f"{low} to {high}")
            lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bandwidth(rows: list[Row]) -> str:
    """Write the GB/s that every kernel reads at one token, beside a plain sum's."""
    kinds = ["dense", *KINDS]
    lines = [
        "| type | rows x inputs | a plain sum | " + " | ".join(kinds) + " |",
        "|---|--:|--:|" + "--:|" * len(kinds),
    ]
    for row in rows:
        if row["tokens"] == 1:
            speeds = [row[k]["bytes"] / row[k]["seconds"] for k in kinds]
            shape = " x ".join(map(str, row["shape"]))
            cells = [f"{speed / 1e9:.1f}" for speed in (row["read"], *speeds)]
            lines.append(f"| {row['type']} | {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does for a bf16 model
    with torch.inference_mode(), arguments.out.open("a", encoding="utf-8") as out:
        for int8 in (False, True):
            for shape in SHAPES:
                tokens = TOKENS + MANY.get(shape, [])
                for row in compare(*shape, int8, tokens, arguments.rounds):
                    out.write(json.dumps(row) + "\n")
                    out.flush()


if __name__ == "__main__":
    main()
