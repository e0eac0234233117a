"""Whether a layer's kernels are right on this machine, before it depends on them."""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.op import sparse_linear

_ROWS = 256  # of the weight that are compared: a copy in float32 of all takes memory
_TOLERANCE = 0.1  # of the norm; rounding tokens to fp8 costs a quarter of it

_known: dict[tuple[object, ...], str | None] = {}


@torch.no_grad()
def failure(
    weight: Tensor,
    values: Tensor | None,
    places: Tensor | None,
    compressed: Tensor | None,
    channel_scale: Tensor | None,
    few_tokens: int,
    dtype: torch.dtype,
) -> str | None:
    """What is wrong with ``sparse_linear`` for a weight; None if nothing is.

    Each kernel that it would use multiplies random tokens, once per shape and process.

    :param weight: the dense weight [rows, K]
    :param dtype: of the tokens; the others as of ``sparse_linear``
    """
    kernels = (places is not None, compressed is not None, few_tokens)
    key = (*weight.shape, weight.dtype, dtype, weight.device, *kernels)
    if key not in _known:
        arguments = (values, places, compressed, channel_scale, None, few_tokens)
        counts = [1] if compressed is None else [1, few_tokens + 1]
        found = [_failure(weight, arguments, count, dtype) for count in counts]
        _known[key] = next((reason for reason in found if reason), None)
    return _known[key]


def _failure(
    weight: Tensor, arguments: tuple, tokens: int, dtype: torch.dtype
) -> str | None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator)
    x = x.to(weight.device, dtype)
    try:
        found = sparse_linear(x, *arguments)[:, :_ROWS].float()
    except Exception as refusal:  # whatever a driver or a compiler has against it
        return f"{type(refusal).__name__} at {tokens} tokens: {str(refusal)[:200]}"
    dense = weight[:_ROWS].float()
    if (scale := arguments[3]) is not None:
        dense = dense * scale[:_ROWS, None]
    wanted = x.float() @ dense.T
    deviation = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if deviation <= _TOLERANCE:  # False for NaN
        return None
    return f"off by {deviation:.2g} of the norm at {tokens} tokens"
