"""A 2:4 linear layer for few tokens, in Triton.

During decoding, a linear layer is memory-bound: it waits for its weight, and a 2:4
weight has little more than half of the bytes. This kernel reads the packed weight,
expands it in registers and multiplies with dense tensor-core instructions; with few
tokens the arithmetic is free. The weight is the left operand, which those instructions
take from registers; the tokens are the right one, padded to 16 by masks.

Entry j of every group of four forms a matrix [rows, K/4], which is multiplied with
every fourth column of x from j on, so that nothing needs to be interleaved.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmc_attnmask.serving.kernels.packing import CHUNK, GROUPS

ROWS = 64  # of the weight, for one program
MAX_SPLIT = 8
WIDE = 128  # programs below which K is split; about the multiprocessors of a big GPU


@dataclass(frozen=True)
class Plan:
    """How one product is divided among programs."""

    tokens: int  # columns of one program's tile
    split: int  # programs that share a tile's sum over K
    chunks: int  # of K, for one of these programs


def plan(tokens: int, rows: int, columns: int) -> Plan:
    """Divide a product; the defaults are unmeasured, see integration/gpu/RESULTS.md."""
    block = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    programs = -(-rows // ROWS) * -(-tokens // block)
    chunks = -(-columns // CHUNK)
    split = 1
    while split < MAX_SPLIT and programs * split < 2 * WIDE and split * 2 <= chunks:
        split *= 2
    each = -(-chunks // split)
    return Plan(block, -(-chunks // each), each)


@triton.jit
def _entry(pair, index, j: tl.constexpr, BITS: tl.constexpr, kind: tl.constexpr):
    # entry j of the group: one of its two kept values, or +0.0
    first = pair & ((1 << BITS) - 1)
    second = (pair >> BITS) & ((1 << BITS) - 1)
    bits = tl.where((index & 3) == j, first, tl.where((index >> 2) == j, second, 0))
    if BITS == 16:
        entry = bits.to(tl.int16).to(kind, bitcast=True)
    else:
        entry = bits.to(tl.int8).to(kind, bitcast=True)
    return entry


@triton.jit
def _quarter(x, j: tl.constexpr, kind: tl.constexpr):
    # columns j, j + 4, j + 8, ... of a tile [tokens, 4 * groups], transposed
    TOKENS: tl.constexpr = x.shape[0]
    by_group = tl.reshape(x, (TOKENS, x.shape[1] // 4, 2, 2))
    even, odd = tl.split(by_group)
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    if j == 0:
        part = zero
    elif j == 1:
        part = one
    elif j == 2:
        part = two
    else:
        part = three
    return tl.trans(part.to(kind, bitcast=True))


# otherwise M = 1 and multiples of 16 would be compiled separately
@triton.jit(do_not_specialize=["M"])
def _sparse_linear(
    x_ptr,  # integers of x's width [M, K]
    pairs_ptr,  # integers of twice the weight's width [N, K/4]: both values of a group
    indices_ptr,  # uint8 [N, chunks * GROUPS]
    out_ptr,  # [M, N], or partial sums [splits, M, N]
    channel_ptr,  # fp32 [N]
    token_ptr,  # fp32 [M]
    bias_ptr,  # [N]
    M,
    N,
    K,
    indices_stride,
    chunks_each,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    DOT_KIND: tl.constexpr,
    W_BITS: tl.constexpr,
    SUM: tl.constexpr,
    TOKEN_SCALED: tl.constexpr,
    CHANNEL_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    n_in = n < N
    m_in = m < M
    n_wide = n.to(tl.int64)
    m_wide = m.to(tl.int64)
    byte = tl.arange(0, GROUPS)
    column = tl.arange(0, 4 * GROUPS)
    total = tl.zeros((ROWS, TOKENS), dtype=SUM)
    chunks = tl.cdiv(K, 8 * GROUPS)
    begin = split * chunks_each
    for chunk in range(begin, tl.minimum(begin + chunks_each, chunks)):
        both = tl.load(
            indices_ptr
            + n_wide[:, None] * indices_stride
            + (chunk * GROUPS + byte)[None, :],
            mask=n_in[:, None],
            other=0,
        ).to(tl.int32)
        for half in tl.static_range(2):
            group = (2 * chunk + half) * GROUPS
            index = (both >> (4 * half)) & 15
            pair = tl.load(
                pairs_ptr + n_wide[:, None] * (K // 4) + (group + byte)[None, :],
                mask=n_in[:, None] & ((group + byte) < K // 4)[None, :],
                other=0,
            ).to(tl.int32)
            x = tl.load(
                x_ptr + m_wide[:, None] * K + (4 * group + column)[None, :],
                mask=m_in[:, None] & ((4 * group + column) < K)[None, :],
                other=0,
            )
            for j in tl.static_range(4):
                entry = _entry(pair, index, j, W_BITS, W_KIND).to(DOT_KIND)
                tokens = _quarter(x, j, X_KIND).to(DOT_KIND)
                total = tl.dot(
                    entry, tokens, total, max_num_imprecise_acc=GROUPS, out_dtype=SUM
                )
    if not PARTIAL:
        total = total.to(tl.float32)
        if CHANNEL_SCALED:
            total *= tl.load(channel_ptr + n, mask=n_in, other=0.0)[:, None]
        if TOKEN_SCALED:
            total *= tl.load(token_ptr + m, mask=m_in, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)[:, None]
    at_out = (split * M + m_wide)[None, :] * N + n_wide[:, None]
    tl.store(
        out_ptr + at_out,
        total.to(out_ptr.dtype.element_ty),
        mask=n_in[:, None] & m_in[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def _add_partials(
    partial_ptr,  # [splits, M, N]
    out_ptr,  # [M, N]
    channel_ptr,
    token_ptr,
    bias_ptr,
    M,
    N,
    SPLITS: tl.constexpr,
    TOKEN_SCALED: tl.constexpr,
    CHANNEL_SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    n_in = n < N
    total = tl.load(partial_ptr + m * N + n, mask=n_in, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + (split * M + m) * N + n, mask=n_in, other=0)
    total = total.to(tl.float32)
    if CHANNEL_SCALED:
        total *= tl.load(channel_ptr + n, mask=n_in, other=0.0)
    if TOKEN_SCALED:
        total *= tl.load(token_ptr + m)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * N + n, total.to(out_ptr.dtype.element_ty), mask=n_in)


_KIND = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def _dot_kind(dtype: torch.dtype) -> tl.dtype:
    # the interpreter multiplies the bits of bfloat16 as integers
    widen = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return tl.float32 if widen else _KIND[dtype]


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply: ``x W^T`` for a packed W.

    x and W have the same dtype, or x has 16 bits and W has 8.

    :param x: [tokens, K], contiguous
    :param values: [rows, K/2], from ``packing.pack``
    :param indices: from ``packing.pack``
    :param channel_scale: fp32 [rows], of the weight
    :param token_scale: fp32 [tokens], of x
    :param bias: [rows]
    :param out_dtype: of the result
    :return: [tokens, rows] in ``out_dtype``
    """
    tokens, columns = x.shape
    rows = values.shape[0]
    how = plan(tokens, rows, columns)
    partial = how.split > 1
    integers = x.dtype == torch.int8
    out = torch.empty(tokens, rows, dtype=out_dtype, device=x.device)
    target = out
    if partial:
        target = torch.empty(
            how.split,
            tokens,
            rows,
            dtype=torch.int32 if integers else torch.float32,
            device=x.device,
        )
    grid = (-(-rows // ROWS), -(-tokens // how.tokens), how.split)
    _sparse_linear[grid](
        x.view(_INTEGER[x.itemsize]),
        values.view(_INTEGER[2 * values.itemsize]),
        indices,
        target,
        channel_scale,
        token_scale,
        bias,
        tokens,
        rows,
        columns,
        indices.stride(0),
        how.chunks,
        X_KIND=_KIND[x.dtype],
        W_KIND=_KIND[values.dtype],
        DOT_KIND=_dot_kind(x.dtype),
        W_BITS=8 * values.itemsize,
        SUM=tl.int32 if integers else tl.float32,
        TOKEN_SCALED=token_scale is not None,
        CHANNEL_SCALED=channel_scale is not None,
        HAS_BIAS=bias is not None,
        PARTIAL=partial,
        ROWS=ROWS,
        TOKENS=how.tokens,
        GROUPS=GROUPS,
        num_warps=4,
        num_stages=3,
    )
    if partial:
        _add_partials[(-(-rows // 256), tokens)](
            target,
            out,
            channel_scale,
            token_scale,
            bias,
            tokens,
            rows,
            SPLITS=how.split,
            TOKEN_SCALED=token_scale is not None,
            CHANNEL_SCALED=channel_scale is not None,
            HAS_BIAS=bias is not None,
            COLUMNS=256,
        )
    return out
