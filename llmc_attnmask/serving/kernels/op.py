"""The one operator that a served sparse layer calls.

A custom operator, so that torch.compile does not look inside, and sees one graph for
every number of tokens; the kernel is picked when the operator runs, or when a CUDA
graph of that size is recorded.
"""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import activations, cusparselt


@torch.library.custom_op("llmc_attnmask::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor | None,
    places: Tensor | None,
    compressed: Tensor | None,
    channel_scale: Tensor | None,
    bias: Tensor | None,
    few_tokens: int,
) -> Tensor:
    """``x W^T + bias`` for a 2:4 weight in 16 bits, or W8A8 for one in 8.

    :param x: [tokens, K] in 16 or 32 bits
    :param values: of ``packing.pack``, and
    :param places: likewise, for the decode kernel
    :param compressed: of ``cusparselt.compress``
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param bias: [rows]
    :param few_tokens: up to so many tokens the decode kernel, above it cuSPARSELt
    :return: [tokens, rows] in x's dtype
    """
    weight = values if values is not None else compressed
    assert weight is not None
    out_dtype = x.dtype
    if not x.shape[0]:
        return x.new_empty(0, weight.shape[0])
    token_scale = None
    if weight.itemsize == 1:
        x, token_scale = activations.quantize(x, weight.dtype)
    x = x.contiguous()
    if x.shape[0] <= few_tokens:
        assert values is not None and places is not None
        # only where it runs: a machine without Triton serves other kernels
        from llmc_attnmask.serving.kernels import triton_decode

        return triton_decode.linear(
            x, values, places, channel_scale, token_scale, bias, out_dtype
        )
    assert compressed is not None
    return cusparselt.linear(x, compressed, channel_scale, token_scale, bias, out_dtype)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor | None,
    places: Tensor | None,
    compressed: Tensor | None,
    channel_scale: Tensor | None,
    bias: Tensor | None,
    few_tokens: int,
) -> Tensor:
    weight = values if values is not None else compressed
    assert weight is not None
    return x.new_empty(x.shape[0], weight.shape[0])
