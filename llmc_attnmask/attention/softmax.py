"""A = softmax(S) in blocks of query rows, and the gradient through it, in plain torch.

Shapes: B samples, H query heads on G key heads, L tokens. Query heads are
grouped by the key head that they share: [B, G, H/G, rows, columns].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.visibility import key_ranges

# Elements of A in one block. Small blocks stay in a CPU's cache and skip more of the
# causally masked half; a GPU needs larger ones.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_LEAST_ROWS = 32  # with fewer, many heads would make blocks too small to be efficient
_BLOCK_ELEMENTS_ACCELERATOR = 2**25


def attention_blocks(call: AttentionCall) -> Iterator[tuple[slice, Tensor]]:
    """Yield A block by block: its rows, and [B, G, H/G, rows, columns]."""
    for rows, columns in row_blocks(call):
        logits, _ = block_logits(call, call.query, call.key, rows, columns)
        yield rows, block_softmax(logits, call)


def row_blocks(call: AttentionCall) -> Iterator[tuple[slice, int]]:
    """Yield query rows and how many leading keys they see: causal masks hide some."""
    batch, heads, rows, _ = call.query.shape
    budget = _BLOCK_ELEMENTS.get(call.query.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    size = max(_LEAST_ROWS, budget // (batch * heads * call.key.shape[2]))
    visible = key_ranges(call, size)[:, 1].tolist()
    for start, columns in zip(range(0, rows, size), visible, strict=True):
        yield slice(start, min(start + size, rows)), columns


def grouped(per_head: Tensor, groups: int) -> Tensor:
    """Reshape [B, H, ...] to [B, G, H/G, ...], by the key head that heads share."""
    return per_head.unflatten(1, (groups, -1))


def block_logits(
    call: AttentionCall, query: Tensor, key: Tensor, rows: slice, columns: int
) -> tuple[Tensor, Tensor | None]:
    """Return logits [B, G, H/G, rows, columns] and the soft cap's derivative there."""
    groups = key.shape[1]
    per_group = grouped(query[:, :, rows], groups)
    flat = per_group.flatten(2, 3) @ key[:, :, :columns].transpose(-1, -2)
    logits = flat.view(*per_group.shape[:-1], columns) * call.scaling
    slope = None
    if call.softcap is not None:
        capped = torch.tanh(logits / call.softcap)
        logits, slope = capped * call.softcap, 1 - capped.square()
    if call.mask is not None:
        mask = _mask_rows(call.mask, rows)[..., :columns]
        mask = mask.expand(mask.shape[0], call.query.shape[1], -1, -1)
        logits = logits + grouped(mask, groups)
    return logits, slope


def block_softmax(logits: Tensor, call: AttentionCall) -> Tensor:
    """Return A; a row of nothing but -inf sees no key and becomes zero."""
    if call.sinks is not None:
        sinks = call.sinks.to(logits.dtype).view(1, logits.shape[1], -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1)
    # masks of -inf are rare, and checking one column costs next to nothing
    if (logits[..., 0] == -torch.inf).any():
        blind = (logits == -torch.inf).all(-1, keepdim=True)
        attention = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    else:
        attention = logits.softmax(-1)
    return attention if call.sinks is None else attention[..., :-1]


def through_softmax(
    attention: Tensor, gradient: Tensor, slope: Tensor | None, call: AttentionCall
) -> Tensor:
    """Return scaling * P, the gradient at the logits.

    All tensors are [B, G, H/G, rows, columns].
    """
    inner = attention * gradient
    inner -= inner.sum(-1, keepdim=True) * attention  # P
    if slope is not None:
        inner *= slope
    return inner.mul_(call.scaling)


def _mask_rows(mask: Tensor, rows: slice) -> Tensor:
    # a bidirectional model hides padding with one row for all queries
    return mask if mask.shape[-2] == 1 else mask[..., rows, :]
