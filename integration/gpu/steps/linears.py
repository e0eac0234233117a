"""Time every kernel at the linear shapes of Llama-3.1-8B, with few and many tokens.

Each is timed in a replayed CUDA graph and called from Python. Weights rotate, so that
no cache holds them; sparse kernels that the step `correct` found wrong are skipped.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from integration.gpu.context import Context
from integration.gpu.figures import DENSE
from integration.gpu.kernels import (
    BLOCKS,
    KERNELS,
    SPARSE,
    Packed,
    missing,
    pack,
    searched,
)
from integration.gpu.steps.correct import wrong
from integration.gpu.timing import Timer
from integration.gpu.weights import (
    CALLS,
    CALLS_PREFILL,
    DTYPES,
    SHAPES,
    SMALL,
    Weight,
    copies,
    random_tokens,
    random_weight,
)

DECODE = (1, 8, 16, 64)
PREFILL = (4096, 1024, 256)  # the most important first
TIMED = ("bf16", "fp8", "int8")
SHAPES_OF_BLOCKS = ["gate_up_proj", "down_proj"]
DTYPES_OF_BLOCKS = ["bf16", "fp8"]
TOKENS_OF_BLOCKS = (64, 16, 1)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS)


def decode(context: Context, options: argparse.Namespace) -> None:
    """Time few tokens, where reading the weight takes the time."""
    kernels = (DENSE[0], *SPARSE, DENSE[1])
    measure(context, options, DECODE, kernels, CALLS)


def prefill(context: Context, options: argparse.Namespace) -> None:
    """Time many tokens, where arithmetic takes the time; decode kernels are not run."""
    kernels = (DENSE[0], "cusparselt", "cusparselt unsearched", DENSE[1])
    measure(context, options, PREFILL, kernels, CALLS_PREFILL)


def blocks(context: Context, options: argparse.Namespace) -> None:
    """Time the CUDA decode kernel with other block sizes."""
    chosen = argparse.Namespace(
        shapes=options.shapes or SHAPES_OF_BLOCKS,
        dtypes=options.dtypes or DTYPES_OF_BLOCKS,
        tokens=options.tokens,
        kernels=options.kernels,
    )
    kernels = ("cuda", *BLOCKS)
    measure(context, chosen, TOKENS_OF_BLOCKS, kernels, CALLS, modes=("graph",))


def measure(
    context: Context,
    options: argparse.Namespace,
    tokens: Sequence[int],
    kernels: Sequence[str],
    calls: int,
    modes: Sequence[str] = ("graph", "eager"),
) -> None:
    """Measure all shapes and types, the most important first."""
    shapes = tuple(options.shapes or SHAPES)
    if context.trial:
        tokens = sorted({min(count, 16) for count in tokens})[:2]
    for pair in (shapes[:2], shapes[2:]):
        for kind in options.dtypes or TIMED:
            for shape in pair:
                case = {"shape": shape, "dtype": kind}
                _measure_one(
                    context,
                    case,
                    options.tokens or tokens,
                    options.kernels or kernels,
                    calls,
                    modes,
                )


def _measure_one(
    context: Context,
    case: dict[str, Any],
    tokens: Sequence[int],
    kernels: Sequence[str],
    calls: int,
    modes: Sequence[str],
) -> None:
    """Measure one shape and type."""
    if context.left() < 2:
        context.attempt(case, dict)  # records that it was skipped
        return
    shape = (SMALL if context.trial else SHAPES)[case["shape"]]
    dtype = DTYPES[case["dtype"]]
    weight = random_weight(*shape, dtype, context.device)
    count = 2 if context.trial else copies(*shape, dtype.itemsize)
    out = wrong(context.rows())
    packed: dict[str, list[Packed]] = {}
    for name in kernels:
        named = case | {"kernel": name}
        if why := missing(name, dtype, shape, context.device):
            context.lacks(name, case["dtype"], why)
        elif name not in DENSE and out & {(name, case["dtype"]), (name, None)}:
            context.lacks(name, case["dtype"], "wrong; see the step `correct`")
        elif not context.failed(**named):
            found = _packed(context, name, weight, count, tokens, named)
            if found:
                packed[name] = found
    timer = Timer(context.device)
    functions = {"graph": timer.graph, "eager": timer.eager}
    for mode in modes:
        function = functions[mode]
        for number in tokens:
            inputs = [
                random_tokens(number, shape[1], dtype, context.device)
                for _ in range(2 if context.trial else max(calls, count))
            ]
            for name, weights in packed.items():
                timed = case | {"tokens": number, "kernel": name, "mode": mode}
                turn = [
                    partial(weights[i % count], *pair) for i, pair in enumerate(inputs)
                ]
                context.attempt(timed, partial(_time, function, turn, timer.device))


def _time(function: Any, turn: list[partial[Tensor]], device: str) -> dict[str, float]:
    found = {"us": function(turn)}
    if device == "cuda":
        torch.cuda.synchronize()  # so that a failure belongs to this case
    return found


def _packed(
    context: Context,
    name: str,
    weight: Weight,
    count: int,
    tokens: Sequence[int],
    case: dict[str, Any],
) -> list[Packed]:
    """Return ``count`` copies, prepared for these tokens; empty if the kernel fails."""
    try:
        start = time.monotonic()
        first = pack(name, weight)
        if context.device == "cuda":
            torch.cuda.synchronize()
        packing = time.monotonic() - start
        found = [first, *(first.copy() for _ in range(count - 1))]
        start = time.monotonic()
        first.prepare(list(tokens))  # for all weights of this shape and type
        preparing = time.monotonic() - start
    except Exception as error:  # whatever it is, try the other kernels
        context.fail(case, error)
        return []
    context.record(
        **case,
        bytes=first.nbytes,
        share=first.nbytes / weight.dense.nbytes,
        pack_seconds=packing,
        prepare_seconds=preparing,
        searched=searched(first),
    )
    return found
