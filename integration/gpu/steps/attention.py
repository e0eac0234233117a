"""Compare the fused kernels of the attention error with float64 and the plain version.

The error and both gradients are computed for one sample with Llama-3.1-8B's heads.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from integration.gpu.context import Context
from integration.gpu.timing import Timer
from llmc_attnmask.attention import matrix
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import attention_error

LENGTHS = (2048, 1024)
HEADS, GROUPS, WIDTH = 32, 8, 128

Inputs = tuple[AttentionCall, Tensor, Tensor, Tensor]


def random_inputs(length: int, dtype: torch.dtype, device: str) -> Inputs:
    """Return a dense call, perturbed q and k as if pruned, and W_o."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    mask.masked_fill_(hidden, torch.finfo(torch.float32).min)
    query, key = normal(1, HEADS, length, WIDTH), normal(1, GROUPS, length, WIDTH)
    value = normal(1, GROUPS, length, WIDTH)
    call = AttentionCall(query, key, value, mask, WIDTH**-0.5)
    return (
        call,
        query + 0.1 * normal(*query.shape),
        key + 0.1 * normal(*key.shape),
        normal(HEADS * WIDTH, HEADS * WIDTH) / (HEADS * WIDTH) ** 0.5,
    )


def error_and_gradients(
    call: AttentionCall, query: Tensor, key: Tensor, projection: Tensor
) -> list[Tensor]:
    pruned = [x.detach().requires_grad_() for x in (query, key)]
    error = attention_error(
        call, *pruned, output_weight=0.9, output_projection=projection
    )
    return [error.detach(), *torch.autograd.grad(error, pruned)]


def in_float32(inputs: Inputs) -> Inputs:
    call, query, key, projection = inputs
    mask = None if call.mask is None else call.mask.float()
    single = AttentionCall(
        call.query.float(), call.key.float(), call.value.float(), mask, call.scaling
    )
    return single, query.float(), key.float(), projection.float()


def deviation(length: int, device: str) -> dict[str, float]:
    """Measure how far the error and both gradients deviate from float64, relatively."""
    inputs = random_inputs(length, torch.float64, device)
    exact = error_and_gradients(*inputs)
    single = error_and_gradients(*in_float32(inputs))
    return {
        name: float((found - expected).norm() / expected.norm())
        for name, found, expected in zip(
            ("error", "query", "key"), single, exact, strict=True
        )
    }


def hidden_row(length: int, device: str) -> dict[str, bool]:
    """Check whether everything stays finite when a query sees no key."""
    call, *pruned = random_inputs(length, torch.float32, device)
    assert call.mask is not None
    call.mask[..., 3, :] = float("-inf")
    found = error_and_gradients(call, *pruned)
    return {"finite": all(bool(part.isfinite().all()) for part in found)}


def speed(length: int, device: str) -> dict[str, float]:
    """Measure milliseconds and peak MiB of one error with its gradients."""
    inputs = random_inputs(length, torch.float32, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    time = Timer(device).eager([partial(error_and_gradients, *inputs)])
    found = {"ms": time / 1000}
    if device == "cuda":
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def choosing(fused: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with or without the fused kernels, whether or not they are the default."""
    fusible = matrix._fusible
    # float64 is the reference that they are compared with
    matrix._fusible = lambda call: fused and call.query.dtype != torch.float64
    try:
        return function(*arguments)
    finally:
        matrix._fusible = fusible


def run(context: Context, options: argparse.Namespace) -> None:
    lengths = (64,) if context.trial else LENGTHS
    short = lengths[-1] // 2
    device = context.device
    case: dict[str, Any] = {"of": "deviation", "length": short}
    kernels = {"fused": not context.trial, "plain": False}  # the interpreter is slow
    context.attempt(case, partial(choosing, kernels["fused"], deviation, short, device))
    for length in lengths:
        for name, fused in kernels.items():
            case = {"of": "speed", "length": length, "kernel": name}
            context.attempt(case, partial(choosing, fused, speed, length, device))
    for name, fused in kernels.items():
        case = {"of": "hidden row", "length": short, "kernel": name}
        context.attempt(case, partial(choosing, fused, hidden_row, short, device))
