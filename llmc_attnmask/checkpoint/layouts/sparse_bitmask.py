"""The ``sparse-bitmask`` encoding of a matrix with zeros anywhere.

compressed-tensors up to 0.14 wrote it. A weight [R, C] with n entries that are not zero
becomes

- ``compressed`` [n]: these entries, row by row, in the weight's dtype;
- ``bitmask`` uint8 [R, ceil(C / 8)]: their columns, as in ``bits.py``;
- ``shape`` int64 [2]: R and C;
- ``row_offsets`` int64 [R]: where each row's entries start in ``compressed``.

Everything works on bits, so that NaN payloads and -0.0 survive: -0.0 is an entry.
(compressed-tensors dropped it.)
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import (
    bits_of,
    count_flags,
    mask_bytes,
    pack_flags,
    row_blocks,
    spread,
)

NAME: Final = "sparse-bitmask"


class PartsDisagreeError(ValueError):
    """Bitmask, row offsets and number of values do not describe the same entries."""


class Packed(NamedTuple):
    """A weight [R, C] in the encoding above; ``unpack(*packed)`` restores it."""

    compressed: Tensor  # [n]
    bitmask: Tensor  # uint8 [R, ceil(C / 8)]
    shape: Tensor  # int64 [2], on the CPU even if the others are not
    row_offsets: Tensor  # int64 [R]


@torch.no_grad()
def pack(weight: Tensor) -> Packed:
    """Encode a matrix.

    :param weight: [R, C] of 1, 2 or 4 bytes per entry, on any device but meta, where
        nothing says how many entries there are
    :raises ValueError: for other shapes and dtypes
    """
    if weight.ndim != 2 or weight.is_meta:
        raise ValueError(
            f"the weight is {list(weight.shape)} on {weight.device.type}; expected two "
            "dimensions, and values"
        )
    bits = bits_of(weight)
    rows, columns = weight.shape
    bitmask = weight.new_empty(rows, mask_bytes(columns), dtype=torch.uint8)
    counts = weight.new_zeros(rows, dtype=torch.int64)
    values = [bits.new_empty(0)]
    for block in row_blocks(weight):
        flags = bits[block].bool()
        bitmask[block] = pack_flags(flags)
        counts[block] = count_flags(bitmask[block])
        values.append(bits[block].masked_select(flags))
    compressed = torch.cat(values).view(weight.dtype)
    shape = torch.tensor([rows, columns])
    return Packed(compressed, bitmask, shape, counts.cumsum(0) - counts)


@torch.no_grad()
def unpack(
    compressed: Tensor,
    bitmask: Tensor,
    shape: Tensor | Sequence[int],
    row_offsets: Tensor,
) -> Tensor:
    """Decode what ``pack`` wrote; entries that are not kept are +0.0.

    :param compressed: [n] of 1, 2 or 4 bytes per entry
    :param bitmask: uint8 [R, ceil(C / 8)]
    :param shape: R and C
    :param row_offsets: int64 [R]
    :return: [R, C], with the dtype and device of ``compressed``
    :raises ValueError: if shapes or dtypes are wrong
    :raises PartsDisagreeError: if the parts do not describe the same entries
    """
    shape = torch.as_tensor(shape)
    dtypes = (bitmask.dtype, shape.dtype, row_offsets.dtype)
    if dtypes != (torch.uint8, torch.int64, torch.int64):
        raise ValueError(
            f"bitmask, shape and row_offsets are {', '.join(map(str, dtypes))}; "
            "expected torch.uint8, torch.int64, torch.int64"
        )
    found = shape.flatten().tolist()
    check_shapes(compressed.shape, bitmask.shape, found, row_offsets.shape)
    rows, columns = found
    values = bits_of(compressed)
    weight = compressed.new_empty(rows, columns)
    first = 0
    for block in row_blocks(weight):
        mask = bitmask[block]
        last = check_rows(mask, row_offsets[block], columns, first, len(values))
        bits_of(weight[block]).copy_(spread(values[first:last], mask, columns))
        first = last
    check_count(first, len(values))
    if not weight.numel() and bool(row_offsets.any()):
        raise PartsDisagreeError("row_offsets are not 0, but there are no columns")
    return weight


def check_shapes(
    compressed: Sequence[int],
    bitmask: Sequence[int],
    shape: Sequence[int],
    row_offsets: Sequence[int],
) -> None:
    """Refuse parts that do not belong to one weight.

    :param compressed: the shape of ``compressed``; likewise the other parts
    :param shape: the content of ``shape``, R and C
    :raises ValueError: if they disagree; the message shows all four
    """
    fit = (
        len(shape) == 2
        and min(shape) >= 0
        and len(compressed) == 1
        and list(bitmask) == [shape[0], mask_bytes(shape[1])]
        and list(row_offsets) == [shape[0]]
    )
    if not fit:
        raise ValueError(
            f"compressed {list(compressed)}, bitmask {list(bitmask)}, shape "
            f"{list(shape)} and row_offsets {list(row_offsets)} disagree; expected "
            "[n], [R, ceil(C / 8)], [R, C] and [R]"
        )


def check_rows(
    bitmask: Tensor, row_offsets: Tensor, columns: int, first: int, values: int
) -> int:
    """Refuse rows whose parts do not describe the same entries.

    :param bitmask: uint8 [r, ceil(C / 8)], of these rows
    :param row_offsets: int64 [r], of these rows
    :param first: where their values start
    :param values: how many there are of the whole weight
    :return: where the values of the next rows start
    :raises PartsDisagreeError: if bitmask and row offsets disagree, a spare bit is set,
        or there are too few values
    """
    if columns % 8 and bool((bitmask[:, -1] >> columns % 8).any()):
        raise PartsDisagreeError(f"the bitmask has bits set beyond column {columns}")
    counts = count_flags(bitmask)
    starts = counts.cumsum(0) - counts + first
    wrong = row_offsets.ne(starts).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise PartsDisagreeError(
            f"a row starts at value {int(row_offsets[row])} according to row_offsets, "
            f"but at {int(starts[row])} according to the bitmask"
        )
    last = first + int(counts.sum())
    check_count(last, values, at_most=True)
    return last


def check_count(bits: int, values: int, *, at_most: bool = False) -> None:
    """Refuse a bitmask that does not have as many bits set as there are values.

    :param at_most: the bits are those of the first rows only
    :raises PartsDisagreeError: with both numbers
    """
    if bits > values or (bits < values and not at_most):
        raise PartsDisagreeError(
            f"the bitmask has {'at least ' * at_most}{bits} bits set, but there are "
            f"{values} values"
        )
