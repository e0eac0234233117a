"""The form in which the Triton decode kernel reads a 2:4 weight; made once, at load.

A row of K columns is K/4 groups of four, each with two kept values:

* ``values`` [rows, K/2]: the kept values in their order, as in the checkpoint.
* ``indices`` uint8 [rows, 32 * ceil(K/256)]: four bits per group, ``first |
  second << 2``, where first < second are the kept columns of the group. Byte b of a
  chunk of 256 columns holds group b in its low half and group b + 32 in its high half,
  so that threads that read neighboring bytes work on neighboring groups.

Bytes relative to dense: 0.5625 in 16 bits, 0.625 in 8 bits.
"""

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.checkpoint.layouts.bits import bits_of

GROUPS = 32  # groups that one read of ``indices`` serves; a chunk is two of these
CHUNK = 2 * GROUPS * 4  # columns
COLUMNS = 8  # K is a multiple of this

# first | second << 2, by the bitmask's code of a group with two bits set.
_INDICES = torch.zeros(16, dtype=torch.uint8)
for _first, _second in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
    _INDICES[1 << _first | 1 << _second] = _first | _second << 2


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 weight; zeros fill up groups with fewer than two nonzeros.

    :param weight: [rows, K], one or two bytes per entry, K a multiple of 8
    :return: values [rows, K/2] in the weight's dtype; indices
    :raises ValueError: if a group has more than two nonzeros, or for another K
    """
    columns = weight.shape[1]
    if columns % COLUMNS:
        raise ValueError(
            f"the weight has {columns} columns; 2:4 kernels need a multiple of "
            f"{COLUMNS}"
        )
    values, nibbles = kept(weight)
    rows = weight.shape[0]
    halves = nibbles.new_zeros(rows, -(-columns // CHUNK), 2, GROUPS)
    halves.view(rows, -1)[:, : columns // 4] = nibbles
    return values, (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, -1)


def kept(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kept values of a 2:4 weight and their columns.

    :param weight: [rows, K], one or two bytes per entry, K a multiple of 4
    :return: values [rows, K/2] in the weight's dtype; ``first | second << 2`` of every
        group, uint8 [rows, K/4]
    :raises ValueError: if a group has more than two nonzeros
    """
    rows, columns = weight.shape
    values, bitmask, _ = sparse_24_bitmask.pack(weight)
    codes = torch.stack((bitmask & 15, bitmask >> 4), dim=-1).view(rows, -1)
    return values, _INDICES.to(weight.device)[codes[:, : columns // 4].int()]


def unpack(values: Tensor, indices: Tensor) -> Tensor:
    """Restore the dense weight: the kept values bit for bit, +0.0 elsewhere.

    :param values: from ``pack``
    :param indices: from ``pack``
    :return: [rows, K]
    """
    rows, half = values.shape
    halves = indices.view(rows, -1, 1, GROUPS)
    nibbles = torch.cat([halves & 15, halves >> 4], dim=2).view(rows, -1)
    return expand(values, nibbles[:, : half // 2])


def expand(values: Tensor, nibbles: Tensor) -> Tensor:
    """Restore the dense weight from what ``kept`` returned.

    :param values: [rows, K/2]
    :param nibbles: uint8 [rows, K/4]
    :return: [rows, K]: the kept values bit for bit, +0.0 elsewhere
    """
    rows, half = values.shape
    indices = nibbles.long()
    bits = bits_of(values)
    dense = bits.new_zeros(rows, half // 2, 4)
    dense.scatter_(
        -1, torch.stack([indices & 3, indices >> 2], -1), bits.view(rows, -1, 2)
    )
    return dense.view(rows, 2 * half).view(values.dtype)
