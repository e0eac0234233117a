"""A 2:4 linear layer for many tokens: the sparse tensor cores, through cuSPARSELt.

torch's own binding. Two of its traps are kept inside: tokens are padded to what the
library takes, and scales go in as a vector, because a scale of one element is read
back to the host, which a CUDA graph forbids.
"""

import torch
from torch import Tensor

MULTIPLE = {2: (16, 8), 1: (32, 16)}  # of rows and columns, of tokens; by item size


def available() -> bool:
    """Whether this torch build and machine have the library."""
    return torch.cuda.is_available() and torch.backends.cusparselt.is_available()


def fits(rows: int, columns: int, itemsize: int) -> bool:
    """Whether the library takes a weight of this shape."""
    multiple = MULTIPLE[itemsize][0]
    return rows % multiple == 0 and columns % multiple == 0


def compress(weight: Tensor) -> Tensor:
    """The library's own form of a 2:4 weight: kept values first, then its metadata.

    :param weight: [rows, K] in fp16, bf16, int8 or fp8, contiguous, on a GPU
    :return: [rows, 9/16 K or more], for 8 bits [rows, 10/16 K or more]: the library
        says how much it wants
    """
    return torch._cslt_compress(weight).view(weight.shape[0], -1)


def kept_values(compressed: Tensor, columns: int) -> Tensor:
    """The first half of K columns of ``compressed``, as [rows, K/2] without a copy.

    Where they are the kept values row by row, the decode kernel may read them there.

    :param columns: K
    """
    rows = compressed.shape[0]
    return compressed.view(-1)[: rows * columns // 2].view(rows, -1)


def linear(
    x: Tensor,
    compressed: Tensor,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x W^T`` for a compressed W of x's dtype; both scales or neither.

    :param x: [tokens, K], contiguous
    :param compressed: as ``compress`` makes it
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param token_scale: fp32 [tokens], of an 8-bit x
    :param bias: [rows] in ``out_dtype``
    :return: [tokens, rows] in ``out_dtype``, which is x's dtype in 16 bits
    """
    tokens = x.shape[0]
    if rest := -tokens % MULTIPLE[x.itemsize][1]:
        # at least two rows, also of one: its transpose would be contiguous, and taken
        # for a matrix that is not transposed
        x = torch.nn.functional.pad(x, (0, 0, 0, rest))
    if channel_scale is None or token_scale is None:
        out = torch._cslt_sparse_mm(compressed, x.t(), bias=bias, transpose_result=True)
        return out[:tokens]
    # Only the rows of W can be scaled inside, in fp32, before the result is rounded; in
    # bfloat16, because without the tokens' scales it can leave the range of fp16.
    # Nothing may be taken from all tokens at once: in a CUDA graph some are padding,
    # with whatever was in their memory.
    product = torch._cslt_sparse_mm(
        compressed,
        x.t(),
        alpha=channel_scale,
        out_dtype=torch.bfloat16,
        transpose_result=True,
    )[:tokens]
    out = torch.empty_like(product, dtype=out_dtype)
    torch.mul(product, token_scale[:, None], out=out)  # in fp32, rounded once
    return out if bias is None else out.add_(bias)
