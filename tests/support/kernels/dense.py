"""The reference for the sparse kernels: the same product with the dense weight.

When vLLM serves a layer dense, it uses its own kernel, not this one.
"""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import packing


def linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x W^T`` in float64, rounded once; parameters as in ``triton_decode.linear``."""
    out = x.double() @ packing.unpack(values, indices).double().t()
    if channel_scale is not None:
        out *= channel_scale.double()
    if token_scale is not None:
        out *= token_scale.double()[:, None]
    if bias is not None:
        out += bias.double()
    return out.to(out_dtype)
