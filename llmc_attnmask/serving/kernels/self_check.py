"""Check a layer's kernels on this machine before they serve the layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import activations
from llmc_attnmask.serving.kernels.forms import Forms
from llmc_attnmask.serving.kernels.op import sparse_linear

TOKENS = (1, 16, 32, 64, 65)
MANY_TOKENS = (512, 2048)  # for cuSPARSELt, whose algorithms differ by size
_ROWS = 128  # at either end of the weight; a float32 copy of all takes too much memory
# Relative to the norm. Rounding the output costs 0.004, 14-bit fp8 sums on Hopper less
# than 0.01; a missing stage of K costs 0.09 with 14336 columns.
_TOLERANCE = 0.04

Multiply = Callable[[Tensor, Tensor | None], Tensor]

_known: dict[tuple[object, ...], str | None] = {}


@torch.no_grad()
def failure(
    weight: Tensor,
    forms: Forms,
    channel_scale: Tensor | None,
    few_tokens: int,
    dtype: torch.dtype,
) -> str | None:
    """Return what is wrong with ``sparse_linear`` for a weight; None if nothing is.

    Once per shape and process, the kernels that would serve it multiply random tokens:
    as many as fill each of their tiles, and one more than the decode kernel takes.

    :param weight: the dense weight [rows, K]
    :param forms: the forms of this weight
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param few_tokens: as in ``sparse_linear``
    :param dtype: of the tokens before quantization, and of the output
    """
    given = (*(form is not None for form in forms), forms.span)
    key = (*weight.shape, weight.dtype, dtype, weight.device, *given, few_tokens)
    counts = TOKENS if forms.compressed is None else TOKENS + MANY_TOKENS

    def multiply(x: Tensor, token_scale: Tensor | None) -> Tensor:
        return sparse_linear(
            x, *forms, channel_scale, token_scale, None, few_tokens, dtype
        )

    return once(key, multiply, weight, channel_scale, counts, dtype)


@torch.no_grad()
def once(
    key: tuple[object, ...],
    multiply: Multiply,
    weight: Tensor,
    channel_scale: Tensor | None,
    counts: Sequence[int],
    dtype: torch.dtype,
) -> str | None:
    """Return what is wrong with a kernel; what it was for this key before, if known.

    :param multiply: the kernel: of x in the weight's dtype, and its scales
    :param weight: the dense weight [rows, K]
    :param counts: numbers of random tokens to multiply
    :param dtype: of the tokens before quantization, and of the output
    """
    if key not in _known:
        found = (
            _failure(multiply, weight, channel_scale, count, dtype) for count in counts
        )
        _known[key] = next((reason for reason in found if reason), None)
    return _known[key]


def _failure(
    multiply: Multiply,
    weight: Tensor,
    channel_scale: Tensor | None,
    tokens: int,
    dtype: torch.dtype,
) -> str | None:
    device = weight.device
    generator = torch.Generator(device).manual_seed(tokens)
    shape = (tokens, weight.shape[1])
    x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    x = x.to(dtype)
    token_scale = None
    if weight.itemsize == 1:
        x, token_scale = activations.reference(x, weight.dtype)
    try:
        # twice: leftovers of the first call must not disturb the second
        outs = [multiply(x, token_scale) for _ in range(2)]
    except Exception as refusal:  # whatever error a driver or compiler raises
        return f"{type(refusal).__name__} at {tokens} tokens: {str(refusal)[:200]}"
    expected = x.float() @ _ends(weight).float().T
    if channel_scale is not None and token_scale is not None:
        expected *= token_scale[:, None] * _ends(channel_scale)
    for out in outs:
        found = _ends(out.T).T.float()
        deviation = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        if not deviation <= _TOLERANCE:  # also for NaN
            return f"relative error {deviation:.2g} at {tokens} tokens"
    return None


def _ends(rows: Tensor) -> Tensor:
    """Return the first and last rows, or all of them if there are few."""
    if len(rows) <= 2 * _ROWS:
        return rows
    # bytes, as some types cannot be concatenated
    bits = rows.view(torch.uint8) if rows.itemsize == 1 else rows
    return torch.cat([bits[:_ROWS], bits[-_ROWS:]]).view(rows.dtype)
