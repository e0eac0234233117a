"""Weights that vLLM made up for a benchmark, ``--load-format dummy``, become 2:4: so a
layer that is 2:4 in the checkpoint is measured on the kernels that would serve it.
"""

import torch
from torch import Tensor

from llmc_attnmask.checkpoint import layout

NOTE = "made-up weights, pruned here"
_ENTRIES = 1 << 22  # that are compared at once, so that it takes little memory


@torch.no_grad()
def prune(weight: Tensor) -> None:
    """Zero the two smallest of every four columns, in place; 2:4 weights stay.

    :param weight: [rows, K] of one or two bytes an entry, contiguous, K a multiple of 4
    """
    bits = layout.bits_of(weight)
    for groups, their_bits in zip(
        weight.view(-1, 4).split(_ENTRIES // 4),
        bits.view(-1, 4).split(_ENTRIES // 4),
        strict=True,
    ):
        smallest = groups.float().abs().argsort(dim=-1)[:, :2]
        their_bits.scatter_(-1, smallest, 0)
