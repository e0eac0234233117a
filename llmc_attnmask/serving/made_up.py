"""Prune the random weights of ``--load-format dummy``.

Layers that are sparse in the checkpoint then run on the kernels that would serve them,
so that a benchmark measures those.
"""

from typing import Literal

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import bits_of

NOTE = "random weights, pruned at load"
UNSTRUCTURED = 0.6  # share of zeros
_ENTRIES = 1 << 22  # compared at once, to limit memory


@torch.no_grad()
def prune(weight: Tensor, structure: Literal["2:4", "unstructured"] = "2:4") -> None:
    """Zero the two smallest of every four columns, or 60 % anywhere, in place.

    2:4 weights stay as they are. config.json does not say how many entries of an
    unstructured layer are zeros.

    :param weight: [rows, K], one or two bytes per entry, contiguous; K a multiple of 4
        for 2:4
    """
    bits = bits_of(weight)
    if structure == "unstructured":
        generator = torch.Generator(weight.device).manual_seed(0)
        for block in bits.view(-1).split(_ENTRIES):
            drawn = torch.rand(
                block.shape,
                generator=generator,
                device=block.device,
                dtype=torch.float32,
            )
            block[drawn < UNSTRUCTURED] = 0
        return
    for groups, their_bits in zip(
        weight.view(-1, 4).split(_ENTRIES // 4),
        bits.view(-1, 4).split(_ENTRIES // 4),
        strict=True,
    ):
        smallest = groups.float().abs().argsort(dim=-1)[:, :2]
        their_bits.scatter_(-1, smallest, 0)
