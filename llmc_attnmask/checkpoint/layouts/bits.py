"""Weights as bits, and masks of one bit per entry.

A bitmask is uint8 [R, ceil(C / 8)]: bit j % 8 of byte j // 8 is set where column j is
kept, and spare bits are zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes per entry
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_BLOCK = 1 << 18  # entries at a time on a CPU; they stay in its cache
_ACCELERATOR_BLOCK = 1 << 24  # elsewhere; `spread` takes 16 bytes for each

_WORDS = {4: torch.int32, 8: torch.int64}  # by flags of a byte each
# By byte of a bitmask: whether each bit is set, how many are, and how many before each.
_SET = (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).bool()  # [256, 8]
_COUNTS = _SET.sum(1, dtype=torch.int32)  # [256]
_BEFORE = _SET.cumsum(1, dtype=torch.int32) - _SET.int()  # [256, 8]


def bits_of(tensor: Tensor) -> Tensor:
    """View the same memory as integers, which preserves NaN and -0.0.

    :raises ValueError: if an entry does not have 1, 2 or 4 bytes
    """
    if tensor.element_size() not in _BITS:
        raise ValueError(
            f"{tensor.dtype} has {tensor.element_size()} bytes per entry; expected 1, "
            "2 or 4"
        )
    return tensor.view(_BITS[tensor.element_size()])


def mask_bytes(columns: int) -> int:
    """Return the bytes per row of a bitmask."""
    return -(-columns // 8)


def codes_of(flags: Tensor, columns: int) -> Tensor:
    """Turn every 4 or 8 flags into an integer, of which bit j is flag j.

    :param flags: bool [R, C], C a multiple of ``columns``
    :return: integers [R * C / columns]
    """
    # The bytes, each 0 or 1, are read as one integer. The product has flag j at bit j
    # of its highest byte, without carries.
    bits = 8 * columns
    factor = sum(1 << (bits - 8 - 7 * j) for j in range(columns))
    words = flags.contiguous().view(_WORDS[columns])
    return (words.flatten() * factor >> (bits - 8)) & (1 << columns) - 1


def pack_flags(flags: Tensor) -> Tensor:
    """Turn flags into a bitmask.

    :param flags: bool [R, C]
    :return: uint8 [R, ceil(C / 8)]
    """
    if not flags.numel():  # its strides may not allow a view
        shape = (len(flags), mask_bytes(flags.shape[1]))
        return flags.new_empty(shape, dtype=torch.uint8)
    spare = -flags.shape[1] % 8
    if spare:
        flags = torch.nn.functional.pad(flags, (0, spare))
    return codes_of(flags, 8).to(torch.uint8).view(len(flags), -1)


def count_flags(bitmask: Tensor) -> Tensor:
    """Count the bits that are set in every row, spare ones included.

    :param bitmask: uint8 [R, ceil(C / 8)]
    :return: int64 [R]
    """
    counts = _COUNTS.to(bitmask.device).index_select(0, bitmask.flatten().int())
    return counts.view(bitmask.shape).sum(1)


def spread(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Put values where bits are set, row by row, and zeros elsewhere.

    :param values: integers [n], as many as bits are set
    :param bitmask: uint8 [R, ceil(C / 8)], without spare bits
    :return: [R, C]
    """
    # Every entry looks up the value that it has or would have. That has no branches,
    # unlike `masked_scatter_`, and takes less than half the time.
    few = len(values) < torch.iinfo(torch.int32).max
    dtype = torch.int32 if few else torch.int64
    codes = bitmask.flatten().int()
    tables = (table.to(bitmask.device) for table in (_COUNTS, _BEFORE, _SET))
    counts, before, is_set = (table.index_select(0, codes) for table in tables)
    first = counts.cumsum(0, dtype=dtype) - counts  # of every byte
    places = (before + first.unsqueeze(1)).flatten()
    padded = torch.cat((values, values.new_zeros(1)))  # for entries after the last bit
    found = padded.index_select(0, places).mul_(is_set.flatten())
    return found.view(len(bitmask), 8 * bitmask.shape[1])[:, :columns]


def matrix(block: Tensor, columns: int, itemsize: int) -> Tensor:
    """View uint8 [bytes] as integers [r, columns] of ``itemsize`` bytes."""
    return block.view(INTEGERS[itemsize]).view(-1, columns)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows to do at a time: a cacheful on a CPU, more on an accelerator."""
    if matrix.is_meta or not matrix.numel():
        return
    rows = len(matrix)
    block = _BLOCK if matrix.device.type == "cpu" else _ACCELERATOR_BLOCK
    step = max(1, block // matrix.shape[1])
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
