"""Compare every kernel with float64 on random inputs, eager and in a CUDA graph.

Outputs start as NaN. Each kernel has its own process, so that a crash or hang does not
affect the others. A kernel that fails, or is wrong at a timed shape, is not timed.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from integration.gpu import record
from integration.gpu.context import Context
from integration.gpu.figures import Figures
from integration.gpu.kernels import KERNELS, SPARSE, Packed, missing, pack
from integration.gpu.weights import (
    DTYPES,
    SHAPES,
    SMALL,
    random_tokens,
    random_weight,
)
from llmc_attnmask.checkpoint.layouts.bits import bits_of

ODD = ((1, 64, 256), (7, 96, 320), (33, 160, 1056), (65, 256, 2048))  # tokens first
TOKENS = (1, 8, 16, 32, 64, 65, 100)
REAL = (("gate_up_proj", 16), ("down_proj", 1), ("down_proj", 64), ("qkv_proj", 8))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel", choices=KERNELS, help="check only this one, in this process"
    )


def cases(trial: bool) -> Iterator[tuple[int, int, int]]:
    """Yield tokens, rows and columns."""
    yield from ODD[:2] if trial else ODD
    shapes = SMALL if trial else SHAPES
    for tokens in TOKENS[:2] if trial else TOKENS:
        yield (tokens, *shapes["o_proj"])
    if not trial:
        for shape, tokens in REAL:
            yield (tokens, *shapes[shape])


def run(context: Context, options: argparse.Namespace) -> None:
    if options.kernel is not None:
        check_kernel(context, options.kernel)
        return
    started = {
        kernel: subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).parents[1] / "step.py")),
                *("correct", "--kernel", kernel, "--out", str(context.folder)),
                *("--seconds", str(min(context.left(), 1e6))),
                *(["--cpu"] if context.trial else []),
                *(["--resume"] if context.done else []),
            ]
        )
        for kernel in (*SPARSE, "dense", "dense vllm")
    }
    for kernel, process in started.items():
        try:
            code = process.wait(timeout=min(max(context.left(), 0.1), 1e6))
        except subprocess.TimeoutExpired:
            process.kill()
            context.record(kernel=kernel, failed="timed out; the rest has no results")
            continue
        if code:
            context.record(kernel=kernel, failed=f"ended with exit code {code}")


def check_kernel(context: Context, name: str) -> None:
    """Check all types and shapes of one kernel."""
    for kind, dtype in DTYPES.items():
        for tokens, rows, columns in cases(context.trial):
            if missing(name, dtype, (rows, columns), context.device):
                continue
            case: dict[str, Any] = {
                "kernel": name,
                "dtype": kind,
                "tokens": tokens,
                "rows": rows,
                "columns": columns,
            }
            context.attempt(case, partial(_check, context.device, **case))
        why = missing(name, dtype, SMALL["o_proj"], context.device)
        if why:
            context.lacks(name, kind, why)


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest error relative to the norm that is allowed.

    Relative to the largest entry, twice that is allowed.

    Rounding a product to bf16 costs 0.002; tensor cores of capability 9.0 may add up
    fp8 with 14 bits, which costs more over thousands of columns.
    """
    return 0.04 if dtype == torch.float8_e4m3fn else 0.01


def _check(
    device: str, kernel: str, dtype: str, tokens: int, rows: int, columns: int
) -> dict[str, Any]:
    weight = random_weight(rows, columns, DTYPES[dtype], device)
    packed = pack(kernel, weight)
    packed.prepare([tokens])
    return errors(packed, tokens, device)


def errors(packed: Packed, tokens: int, device: str) -> dict[str, Any]:
    """Measure relative errors, eager and replayed; ``right``: whether all are small."""
    weight = packed.weight
    x, scale = random_tokens(tokens, weight.dense.shape[1], weight.dense.dtype, device)
    expected = weight.product(x, scale)
    poison(expected.numel(), device)
    found = {"eager": packed(x, scale)}
    if device == "cuda":
        found["graph"] = in_graph(packed, x, scale)
    result: dict[str, Any] = {}
    right, most = True, tolerance(weight.dense.dtype)
    for mode, out in found.items():
        if out.dtype != weight.out_dtype or out.shape != expected.shape:
            raise ValueError(f"{mode}: {out.dtype} {tuple(out.shape)}")
        difference = out.double() - expected
        of_norm = float(difference.norm() / expected.norm())
        of_largest = float(difference.abs().max() / expected.abs().max())
        right &= of_norm < most and of_largest < 2 * most  # False for NaN
        result |= {mode: of_norm, f"{mode} largest": of_largest}
    return result | {"right": right}


def poison(entries: int, device: str) -> None:
    """Fill the memory that the next allocations get with NaN."""
    blocks = [
        torch.full((size,), float("nan"), device=device, dtype=dtype)
        for size in (entries, 2 * entries, 4 * entries, 8 * entries)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    del blocks


def in_graph(packed: Packed, x: Tensor, scale: Tensor | None) -> Tensor:
    """Record a kernel with other tokens, replay it with these; return the output."""
    packed(x, scale)  # compiles, which must not happen while recording
    own, bits = x.clone(), bits_of(x)
    bits.copy_(bits.roll(1, dims=-1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed(x, scale)
    x.copy_(own)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out


def wrong(rows: list[record.Row]) -> set[tuple[str, str | None]]:
    """Return kernel and type of all cases that must not be timed.

    They failed, or were wrong at one of ``SHAPES``, and did not pass later. The type
    None stands for all types.
    """
    timed = set(SHAPES.values())
    return {
        (row["kernel"], row.get("dtype"))
        for row in Figures(rows).correctness()
        if "failed" in row
        or (row.get("right") is False and (row["rows"], row["columns"]) in timed)
    }
