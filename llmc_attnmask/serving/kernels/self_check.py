"""Whether a layer's kernels are right on this machine, before it depends on them."""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import activations
from llmc_attnmask.serving.kernels.forms import Forms
from llmc_attnmask.serving.kernels.op import sparse_linear

TOKENS = (1, 16, 32, 64, 65)
MANY_TOKENS = (512, 2048)  # of cuSPARSELt, whose algorithms differ
_ROWS = 128  # at either end of the weight: a copy in float32 of all takes memory
# Of the norm. Rounding the output takes 0.004 of it, fp8 sums of 14 bits on Hopper less
# than 0.01; one stage of K that is left out, of 14336 columns, 0.09.
_TOLERANCE = 0.04

_known: dict[tuple[object, ...], str | None] = {}


@torch.no_grad()
def failure(
    weight: Tensor,
    forms: Forms,
    channel_scale: Tensor | None,
    few_tokens: int,
    dtype: torch.dtype,
) -> str | None:
    """What is wrong with ``sparse_linear`` for a weight; None if nothing is.

    The kernels that it would use multiply random tokens, once per shape and process:
    as many as fill each of their tiles, and one more than the decode kernel takes.

    :param weight: the dense weight [rows, K]
    :param forms: of it
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param few_tokens: as of ``sparse_linear``
    :param dtype: of the tokens before they are rounded, and of the output
    """
    given = (*(form is not None for form in forms), forms.span)
    key = (*weight.shape, weight.dtype, dtype, weight.device, *given, few_tokens)
    if key not in _known:
        counts = TOKENS if forms.compressed is None else TOKENS + MANY_TOKENS
        found = (
            _failure(weight, forms, channel_scale, few_tokens, count, dtype)
            for count in counts
        )
        _known[key] = next((reason for reason in found if reason), None)
    return _known[key]


def _failure(
    weight: Tensor,
    forms: Forms,
    channel_scale: Tensor | None,
    few_tokens: int,
    tokens: int,
    dtype: torch.dtype,
) -> str | None:
    device = weight.device
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator, device=device)
    x = x.to(dtype)
    token_scale = None
    if weight.itemsize == 1:
        x, token_scale = activations.reference(x, weight.dtype)
    rest = (channel_scale, token_scale, None, few_tokens, dtype)
    try:
        # twice: what the first leaves behind must not disturb the second
        outs = [sparse_linear(x, *forms, *rest) for _ in range(2)]
    except Exception as refusal:  # whatever a driver or a compiler has against it
        return f"{type(refusal).__name__} at {tokens} tokens: {str(refusal)[:200]}"
    wanted = x.float() @ _ends(weight).float().T
    if channel_scale is not None and token_scale is not None:
        wanted *= token_scale[:, None] * _ends(channel_scale)
    for out in outs:
        found = _ends(out.T).T.float()
        deviation = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not deviation <= _TOLERANCE:  # also for NaN
            return f"off by {deviation:.2g} of the norm at {tokens} tokens"
    return None


def _ends(rows: Tensor) -> Tensor:
    """The first and the last rows, or all if they are few."""
    if len(rows) <= 2 * _ROWS:
        return rows
    # bytes, as some types cannot be concatenated
    bits = rows.view(torch.uint8) if rows.itemsize == 1 else rows
    return torch.cat([bits[:_ROWS], bits[-_ROWS:]]).view(rows.dtype)
