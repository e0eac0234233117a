"""Whether a layer's kernels are right on this machine, before it depends on them."""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import activations
from llmc_attnmask.serving.kernels.forms import Forms
from llmc_attnmask.serving.kernels.op import sparse_linear

TOKENS = (1, 16, 32, 64, 65)
MANY_TOKENS = (512, 2048)  # of cuSPARSELt, whose algorithms differ
_ROWS = 256  # of the weight that are compared: a copy in float32 of all takes memory
_TOLERANCE = 0.1  # of the norm; rounding tokens to fp8 costs a quarter of it

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
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    x = rounded = x.to(weight.device, dtype)
    token_scale = None
    if weight.itemsize == 1:
        rounded, token_scale = activations.reference(x, weight.dtype)
    rest = (channel_scale, token_scale, None, few_tokens, dtype)
    try:
        found = sparse_linear(rounded, *forms, *rest)[:, :_ROWS].float()
    except Exception as refusal:  # whatever a driver or a compiler has against it
        return f"{type(refusal).__name__} at {tokens} tokens: {str(refusal)[:200]}"
    dense = weight[:_ROWS].float()
    if channel_scale is not None:
        dense = dense * channel_scale[:_ROWS, None]
    wanted = x.float() @ dense.T
    deviation = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if deviation <= _TOLERANCE:  # False for NaN
        return None
    return f"off by {deviation:.2g} of the norm at {tokens} tokens"
