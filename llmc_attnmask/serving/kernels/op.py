"""The operator that every served sparse layer calls.

It is a custom operator, so torch.compile does not look inside and sees one graph for
every number of tokens. The kernel is selected when the operator runs, or when a CUDA
graph of that size is recorded. Tokens are quantized to 8 bits before the operator,
where a compiler can see this step and fuse it with what precedes it.
"""

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import cuda_decode, cusparselt


@torch.library.custom_op("llmc_attnmask::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor | None,
    indices: Tensor | None,
    arrived: Tensor | None,
    compressed: Tensor | None,
    span: int,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    few_tokens: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply: ``x W^T + bias`` for a 2:4 weight of x's dtype; both scales or neither.

    :param x: [tokens, K] in fp16 or bf16, int8 or fp8
    :param values: for a decode kernel, from ``cuda_decode.pack`` or ``packing.pack``
    :param indices: for a decode kernel, from the same function
    :param arrived: from ``cuda_decode.counters``; None for the Triton decode kernel
    :param compressed: from ``cusparselt.compress``
    :param span: of ``indices``, for the CUDA decode kernel; see ``fragments``
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param token_scale: fp32 [tokens], of an 8-bit x
    :param bias: [rows] in ``out_dtype``
    :param few_tokens: a decode kernel takes up to this many tokens, cuSPARSELt more
    :param out_dtype: fp16 or bf16; the dtype of a 16-bit x
    :return: [tokens, rows] in ``out_dtype``
    """
    if not x.shape[0]:
        return _empty(x, values, compressed, out_dtype)
    x = x.contiguous()
    if x.shape[0] <= few_tokens:
        assert values is not None and indices is not None
        if arrived is not None:
            return cuda_decode.linear(
                x,
                values,
                indices,
                arrived,
                channel_scale,
                token_scale,
                bias,
                out_dtype,
                span,
            )
        # imported only here: a machine without Triton runs the other kernels
        from llmc_attnmask.serving.kernels import triton_decode

        return triton_decode.linear(
            x, values, indices, channel_scale, token_scale, bias, out_dtype
        )
    assert compressed is not None
    return cusparselt.linear(x, compressed, channel_scale, token_scale, bias, out_dtype)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor | None,
    indices: Tensor | None,
    arrived: Tensor | None,
    compressed: Tensor | None,
    span: int,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    few_tokens: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return _empty(x, values, compressed, out_dtype)


def _empty(
    x: Tensor, values: Tensor | None, compressed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    weight = values if values is not None else compressed
    assert weight is not None
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
