"""The attention matrix, the error of a pruned one, and that error's exact gradient.

For one head with logits S = scaling * Q K^T (soft-capped and masked where the model
does so), the attention matrix is A = softmax(S), row by row. With Q~ and K~ from
pruned weights, the error is, with one term per head (arXiv 2410.11261),

    E  = ||A~ - A||_F^2
    Eo = ||sum_h (A~_h - A_h) V_h W_o,h||_F^2      the part that reaches the output

With G = dE/dA~, the gradient through the softmax is P = A~ o (G - rowsum(A~ o G)). For
G = C this is the paper's P = F o C - diag((F o C) 1) F. Then dE/dQ~ = scaling * P K~,
and dE/dK~ = scaling * P^T Q~, summed over the query heads that share a key head.

Everything is computed in blocks of query rows (``softmax.py``), so memory does not grow
with L^2. On a GPU the error and its gradient come from the kernels in ``fused.py``
instead, where ``fused_choice.py`` says so.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.fused_choice import fusible as _fusible
from llmc_attnmask.attention.softmax import (
    attention_blocks,
    block_logits,
    block_softmax,
    grouped,
    row_blocks,
    through_softmax,
)


class AttentionNorms(NamedTuple):
    """Sums of squares that make the errors relative."""

    matrix: float  # ||A||_F^2 over heads and samples
    output: float  # ||sum_h A_h V_h W_o,h||_F^2 over samples


def attention_norms(
    call: AttentionCall, output_projection: Tensor | None = None
) -> AttentionNorms:
    """Return the squared norms of the attention matrix and of the attention output.

    :param output_projection: [D, H * dv] weight of o_proj; without it ``output`` is 0
    """
    matrix = output = 0.0
    with torch.no_grad():
        for _, attention in attention_blocks(call):
            matrix += attention.square().sum().item()
            if output_projection is not None:
                reached = _to_output(attention, call, output_projection)
                output += reached.square().sum().item()
    return AttentionNorms(matrix, output)


def first_rows(call: AttentionCall, rows: int) -> Tensor:
    """Return the attention of the first queries to every key.

    :return: [B, H, min(rows, L), L]
    """
    first = slice(0, min(rows, call.query.shape[2]))
    logits, _ = block_logits(call, call.query, call.key, first, call.key.shape[2])
    return _per_head(block_softmax(logits, call), call)


@torch.no_grad()
def attention_changes(
    reference: AttentionCall,
    pruned: Sequence[AttentionCall],
    output_projection: Tensor,
) -> list[AttentionNorms]:
    """Return E and Eo separately, for several pruned modules at once.

    The result is not differentiable.

    :param reference: call of the dense module
    :param pruned: calls of the pruned modules; only query and key are used
    :param output_projection: [D, H * dv] weight of o_proj
    """
    sums = [[0.0, 0.0] for _ in pruned]
    for rows, columns in row_blocks(reference):
        dense, *others = (
            block_softmax(
                block_logits(reference, c.query, c.key, rows, columns)[0], reference
            )
            for c in (reference, *pruned)
        )
        for total, attention in zip(sums, others, strict=True):
            change = attention - dense
            reached = _to_output(change, reference, output_projection)
            total[0] += change.square().sum().item()
            total[1] += reached.square().sum().item()
    return [AttentionNorms(*total) for total in sums]


def attention_error(
    reference: AttentionCall,
    query: Tensor,
    key: Tensor,
    *,
    matrix_weight: float = 1.0,
    output_weight: float = 0.0,
    output_projection: Tensor | None = None,
) -> Tensor:
    """Return ``matrix_weight * E + output_weight * Eo`` summed over samples and heads.

    Differentiable in ``query`` and ``key``; the gradient is the closed form above,
    computed in the same pass.

    :param reference: call of the dense module: A, V, mask, scaling, soft cap and sinks
    :param query: [B, H, L, dh] of the pruned module
    :param key: [B, G, L, dh] of the pruned module
    :param output_projection: [D, H * dv] weight of o_proj, needed if ``output_weight``
    :return: scalar, in the dtype of ``query``
    :raises ValueError: if ``output_weight`` is given without ``output_projection``
    """
    if output_weight and output_projection is None:
        raise ValueError("output_weight > 0 needs the output_projection's weight")
    weights = (matrix_weight, output_weight, output_projection)
    return _AttentionError.apply(query, key, reference, weights)


class _AttentionError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, reference: AttentionCall, weights: Any
    ) -> Tensor:
        matrix_weight, output_weight, output_projection = weights
        need_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        fused = _fused(reference, query, key, *weights, need_gradient)
        if fused is not None:
            total, gradients = fused
            if gradients is not None:
                ctx.save_for_backward(*(g.to(query.dtype) for g in gradients))
            return total.to(query.dtype)
        error = query.new_zeros(())
        query_gradient = torch.zeros_like(query)
        key_gradient = torch.zeros_like(key)
        for rows, columns in row_blocks(reference):
            dense = block_softmax(
                block_logits(reference, reference.query, reference.key, rows, columns)[
                    0
                ],
                reference,
            )
            logits, slope = block_logits(reference, query, key, rows, columns)
            pruned = block_softmax(logits, reference)
            change = pruned - dense
            gradient = torch.zeros_like(change)
            if matrix_weight:
                error += matrix_weight * change.square().sum()
                gradient += (2 * matrix_weight) * change
            if output_weight:
                reached = _to_output(change, reference, output_projection)
                error += output_weight * reached.square().sum()
                gradient += _from_output(
                    (2 * output_weight) * reached, reference, output_projection, columns
                )
            if not need_gradient:
                continue
            inner = through_softmax(pruned, gradient, slope, reference)
            query_gradient[:, :, rows] = _to_query(inner, key)
            key_gradient[:, :, :columns] += _to_key(inner, query[:, :, rows])
        if need_gradient:
            ctx.save_for_backward(query_gradient, key_gradient)
        return error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query_gradient, key_gradient = ctx.saved_tensors
        return upstream * query_gradient, upstream * key_gradient, None, None


def probe_gradients(
    call: AttentionCall,
    generator: torch.Generator,
    *,
    matrix_weight: float,
    output_weight: float,
    output_projection: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients g of a random projection of A and of A V W_o.

    The projection is on random signs, which have a mean of zero.

    Their second moment is the Gauss-Newton matrix of ``attention_error`` at the dense
    weights: E[g g^T] = matrix_weight * J^T J + output_weight * Jo^T Jo. With J = dA/dQ,
    J^T J is scaling^2 * K^T (diag(a) - a a^T)^2 K for a query with the row a of A.

    :param generator: draws the signs; on the device of the call
    :return: with respect to the query [B, H, L, dh] and to the key [B, G, L, dh]
    """
    query_gradient = torch.zeros_like(call.query)
    key_gradient = torch.zeros_like(call.key)
    for rows, columns in row_blocks(call):
        logits, slope = block_logits(call, call.query, call.key, rows, columns)
        attention = block_softmax(logits, call)
        gradient = math.sqrt(matrix_weight) * _signs(attention.shape, generator, call)
        if output_weight:
            shape = (call.query.shape[0], logits.shape[-2], output_projection.shape[0])
            probe = math.sqrt(output_weight) * _signs(shape, generator, call)
            gradient += _from_output(probe, call, output_projection, columns)
        inner = through_softmax(attention, gradient, slope, call)
        query_gradient[:, :, rows] = _to_query(inner, call.key)
        key_gradient[:, :, :columns] += _to_key(inner, call.query[:, :, rows])
    return query_gradient, key_gradient


def _signs(
    shape: Sequence[int], generator: torch.Generator, call: AttentionCall
) -> Tensor:
    # drawn where they are needed, because there are as many as entries of A
    signs = torch.randint(2, shape, generator=generator, device=generator.device)
    return signs.to(call.query) * 2 - 1


def attention_context(call: AttentionCall, value: Tensor) -> Tensor:
    """Return what o_proj reads: A V of every head, side by side.

    Differentiable in ``value``; the backward pass computes A again.

    :param call: defines A
    :param value: [B, G, L, dv]
    :return: [B, L, H * dv]
    """
    return _AttentionContext.apply(value, call)


class _AttentionContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, call: AttentionCall) -> Tensor:
        ctx.call = call
        mixed = torch.cat(
            [_mixed(attention, value) for _, attention in attention_blocks(call)],
            dim=2,
        )
        return mixed.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        call: AttentionCall = ctx.call
        heads, groups = call.query.shape[1], call.value.shape[1]
        per_head = upstream.unflatten(-1, (heads, -1)).transpose(1, 2)
        gradient = torch.zeros_like(call.value)
        for rows, attention in attention_blocks(call):
            per_group = grouped(per_head[:, :, rows], groups).flatten(2, 3)
            columns = attention.shape[-1]
            gradient[:, :, :columns] += attention.flatten(2, 3).mT @ per_group
        return gradient, None


def _fused(
    reference: AttentionCall, query: Tensor, *arguments: Any
) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """Return error and gradients from the GPU kernels; None where they are not used."""
    if not _fusible(reference):
        return None
    from llmc_attnmask.attention.fused import error_and_gradient

    return error_and_gradient(reference, query, *arguments)


def _per_head(grouped: Tensor, call: AttentionCall) -> Tensor:
    """Reshape [B, G, H/G, rows, columns] to [B, H, rows, columns]."""
    return grouped.flatten(1, 2)


def _to_query(inner: Tensor, key: Tensor) -> Tensor:
    """Return P K: [B, G, H/G, rows, columns] -> [B, H, rows, dh]."""
    flat = inner.flatten(2, 3) @ key[:, :, : inner.shape[-1]]
    return flat.view(*inner.shape[:-1], -1).flatten(1, 2)


def _to_key(inner: Tensor, query_rows: Tensor) -> Tensor:
    """Return P^T Q over the heads of a group: [B, G, columns, dh]."""
    per_group = grouped(query_rows, inner.shape[1]).flatten(2, 3)
    return inner.flatten(2, 3).mT @ per_group


def _to_output(
    attention: Tensor, call: AttentionCall, output_projection: Tensor
) -> Tensor:
    """Return sum_h A_h V_h W_o,h: [B, G, H/G, rows, columns] -> [B, rows, D]."""
    mixed = _mixed(attention, call.value)
    return mixed.transpose(1, 2).flatten(2) @ output_projection.T


def _mixed(attention: Tensor, value: Tensor) -> Tensor:
    """Return A V: [B, G, H/G, rows, columns] and [B, G, L, dv] -> [B, H, rows, dv]."""
    mixed = attention.flatten(2, 3) @ value[:, :, : attention.shape[-1]]
    return mixed.view(*attention.shape[:-1], -1).flatten(1, 2)


def _from_output(
    gradient: Tensor, call: AttentionCall, output_projection: Tensor, columns: int
) -> Tensor:
    """Apply the transpose of ``_to_output``.

    [B, rows, D] -> [B, G, H/G, rows, columns]
    """
    heads, groups = call.query.shape[1], call.value.shape[1]
    mixed = (gradient @ output_projection).unflatten(-1, (heads, -1)).transpose(1, 2)
    per_group = grouped(mixed, groups)  # [B, G, H/G, rows, dv]
    flat = per_group.flatten(2, 3) @ call.value[:, :, :columns].transpose(-1, -2)
    return flat.view(*per_group.shape[:-1], columns)
