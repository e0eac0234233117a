"""Compile every kernel in advance, in several processes, for the steps that follow.

It records the slowest first call of each kernel, for which a user waits once per
machine, and the seconds of the whole task.
"""

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from integration.gpu.context import Context
from integration.gpu.kernels import missing, pack
from integration.gpu.steps import attention
from integration.gpu.steps.correct import ODD
from integration.gpu.weights import (
    DTYPES,
    SHAPES,
    SMALL,
    random_tokens,
    random_weight,
)

TOKENS = (1, 8, 16, 32, 64)
PROCESSES = 12


def tasks(trial: bool) -> Iterator[dict[str, Any]]:
    """Yield what one process compiles at a time.

    Triton comes first, as it takes longest; it caches its results on disk, unlike
    NVRTC.
    """
    for kind in DTYPES:
        for name in (
            ("gate_up_proj",) if trial else ("gate_up_proj", "down_proj", "odd")
        ):
            yield {"kernel": "triton", "dtype": kind, "shape": name}
    yield {"kernel": "attention"}
    for kind in DTYPES:
        yield {"kernel": "cuda", "dtype": kind, "shape": "gate_up_proj"}


def compile_one(task: dict[str, Any], device: str) -> dict[str, Any]:
    """Call a kernel for the first time; returns figures, or why it is missing."""
    start = time.monotonic()
    if task["kernel"] == "attention":
        length = 64 if device == "cpu" else 512
        inputs = attention.random_inputs(length, torch.float32, device)
        attention.choosing(device == "cuda", attention.error_and_gradients, *inputs)
        total = _seconds(start, device)
        return {"seconds": total, "slowest": total}
    dtype = DTYPES[task["dtype"]]
    cases = [shape[1:] for shape in ODD], [shape[0] for shape in ODD]
    if task["shape"] != "odd":
        shape = (SMALL if device == "cpu" else SHAPES)[task["shape"]]
        counts = TOKENS[:2] if device == "cpu" else TOKENS
        cases = [shape] * len(counts), list(counts)
    slowest = 0.0
    for shape, tokens in zip(*cases, strict=True):
        if why := missing(task["kernel"], dtype, shape, device):
            return {"missing": why}
        weight = random_weight(*shape, dtype, device)
        x, scale = random_tokens(tokens, shape[1], dtype, device)
        packed = pack(task["kernel"], weight)
        packed.prepare([tokens])
        called = time.monotonic()
        packed(x, scale)
        slowest = max(slowest, _seconds(called, device))
    return {"seconds": _seconds(start, device), "slowest": slowest}


def _seconds(start: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


def run(context: Context, options: argparse.Namespace) -> None:
    count = 1 if context.trial else min(PROCESSES, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    futures: dict[Future[dict[str, Any]], dict[str, Any]] = {
        pool.submit(compile_one, task, context.device): task
        for task in tasks(context.trial)
    }
    timeout = min(max(context.left(), 0.1), 1e6)
    try:
        for future in as_completed(futures, timeout=timeout):
            context.attempt(futures[future], future.result)
    except TimeoutError:
        left = [task for future, task in futures.items() if not future.done()]
        context.record(failed="no time left", left_out=len(left), first=left[0])
        for process in list(pool._processes.values()):
            process.kill()  # otherwise this process would wait for them
    pool.shutdown(cancel_futures=True)
