"""Prune the random weights of ``--load-format dummy`` to 2:4.

Layers that are 2:4 in the checkpoint then run on the kernels that would serve them, so
that a benchmark measures those.
"""

import torch
from torch import Tensor

from llmc_attnmask.checkpoint import layout

NOTE = "random weights, pruned at load"
_ENTRIES = 1 << 22  # compared at once, to limit memory


@torch.no_grad()
def prune(weight: Tensor) -> None:
    """Zero the two smallest of every four columns, in place; 2:4 weights do not change.

    :param weight: [rows, K], one or two bytes per entry, contiguous, K a multiple of 4
    """
    bits = layout.bits_of(weight)
    for groups, their_bits in zip(
        weight.view(-1, 4).split(_ENTRIES // 4),
        bits.view(-1, 4).split(_ENTRIES // 4),
        strict=True,
    ):
        smallest = groups.float().abs().argsort(dim=-1)[:, :2]
        their_bits.scatter_(-1, smallest, 0)
