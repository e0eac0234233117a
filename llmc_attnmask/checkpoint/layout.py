"""The ``sparse-24-bitmask`` encoding of a 2:4 matrix: two values of every four inputs.

compressed-tensors wrote it up to 0.14, and vLLM up to 0.18.1 reads it. A weight [R, C]
becomes

- ``compressed`` [R, C / 2]: the kept values, row by row, in the weight's dtype;
- ``bitmask`` uint8 [R, ceil(C / 8)]: bit j % 8 of byte j // 8 is set where column j is
  kept, and spare bits are zero;
- ``shape`` int64 [2, 1]: R and C.

Exactly two entries of every four are kept; a group with more zeros keeps some of them,
the same as compressed-tensors on a CPU.
Everything is done on bits, so that NaN payloads, -0.0 and the int8 -128 survive.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "sparse-24-bitmask"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes per entry
_BLOCK = 1 << 18  # entries at once on a CPU: what stays in its cache

# The flags of a group of four are a code below 16, column j of the group its bit j.
# By code: the code with exactly two set; 0 if more are. Fewer are filled up as torch's
# topk(2) on a CPU breaks ties, by which compressed-tensors chose.
_FILLED = torch.tensor([12, 5, 10, 3, 12, 5, 6, 0, 12, 9, 10, 0, 12, 0, 0, 0])
# By code with exactly two set: their columns.
_COLUMNS = torch.zeros(16, 2, dtype=torch.int64)
for _code in set(_FILLED.tolist()) - {0}:
    _COLUMNS[_code] = torch.tensor([j for j in range(4) if _code >> j & 1])


class NotTwoOfFourError(ValueError):
    """A matrix, or a mask, that has not two kept entries in every four."""


class Packed(NamedTuple):
    """A weight [R, C] in the encoding above; ``unpack(*packed)`` restores it."""

    compressed: Tensor  # [R, C / 2]
    bitmask: Tensor  # uint8 [R, ceil(C / 8)]
    shape: Tensor  # int64 [2, 1], on the CPU even if the others are not


@torch.no_grad()
def pack(weight: Tensor, kept: Tensor | None = None) -> Packed:
    """Encode a 2:4 matrix.

    :param weight: [R, C] of 1, 2 or 4 bytes per entry, on any device; a meta tensor
        gives meta tensors
    :param kept: bool [R, C], exactly two of every four consecutive columns; what it
        leaves out is dropped, whatever its value. By default what is not +0.0 is kept, and
        of a group with more zeros as many as make it two
    :raises NotTwoOfFourError: if a group has more, or with a mask not exactly, two
    :raises ValueError: for other shapes and dtypes
    """
    rows, columns = _checked_shape(weight)
    if kept is not None and (kept.shape != weight.shape or kept.dtype != torch.bool):
        raise ValueError(
            f"the mask is {kept.dtype} {list(kept.shape)}; expected torch.bool "
            f"{list(weight.shape)}, as the weight"
        )
    compressed = weight.new_empty(rows, columns // 2)
    bitmask = weight.new_empty(rows, _mask_bytes(columns), dtype=torch.uint8)
    for block in _row_blocks(weight):
        if kept is None:
            codes = _filled(_codes(_bits(weight[block]) != 0))
            _refuse(codes == 0, block, "more than two entries that are not +0.0")
        else:
            codes = _codes(kept[block])
            _refuse(_filled(codes) != codes, block, "not exactly two entries kept")
        groups = _bits(weight[block]).reshape(-1, 4)
        values = groups.gather(1, _columns(codes))
        _bits(compressed[block]).copy_(values.view(-1, columns // 2))
        bitmask[block] = _bytes(codes)
    return Packed(compressed, bitmask, torch.tensor([[rows], [columns]]))


@torch.no_grad()
def unpack(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int]
) -> Tensor:
    """Decode what ``pack`` wrote; what is not kept is +0.0.

    :param compressed: [R, C / 2] of 1, 2 or 4 bytes per entry; a meta tensor gives one
    :param bitmask: uint8 [R, ceil(C / 8)]
    :param shape: R and C
    :return: [R, C], dtype and device of ``compressed``
    :raises ValueError: if the shapes disagree
    :raises NotTwoOfFourError: if the bitmask has not exactly two bits per group
    """
    rows, columns = _agreed_shape(compressed, bitmask, shape)
    weight = compressed.new_empty(rows, columns)
    for block in _row_blocks(weight):
        codes = _codes_of_bytes(bitmask[block], columns)
        _refuse(_filled(codes) != codes, block, "not exactly two bits set")
        groups = _bits(weight[block]).zero_().view(-1, 4)
        values = _bits(compressed[block]).reshape(-1, 2)
        groups.scatter_(1, _columns(codes), values)
    return weight


@torch.no_grad()
def kept_entries(weight: Tensor) -> Tensor:
    """The mask that ``pack`` takes by default.

    :param weight: as for ``pack``
    :return: bool [R, C]
    :raises NotTwoOfFourError, ValueError: as ``pack``
    """
    packed = pack(weight)
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    for block in _row_blocks(weight):
        codes = _codes_of_bytes(packed.bitmask[block], weight.shape[1])
        columns = kept[block].zero_().view(-1, 4)
        columns.scatter_(1, _columns(codes), True)
    return kept


@torch.no_grad()
def crowded_groups(weight: Tensor) -> int:
    """In how many groups of four more than two entries are not +0.0; 0 means 2:4.

    :param weight: as for ``pack``
    """
    _checked_shape(weight)
    return sum(
        int((_filled(_codes(_bits(weight[block]) != 0)) == 0).sum())
        for block in _row_blocks(weight)
    )


def _checked_shape(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ValueError(f"the weight is {list(weight.shape)}; expected two dimensions")
    _bits(weight)
    if weight.shape[1] % 4:
        raise NotTwoOfFourError(
            f"{weight.shape[1]} inputs are not divisible by 4, so there are no groups "
            "of four"
        )
    return weight.shape[0], weight.shape[1]


def _agreed_shape(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int]
) -> tuple[int, int]:
    if compressed.ndim != 2:
        raise ValueError(
            f"compressed is {list(compressed.shape)}; expected two dimensions"
        )
    rows, columns = compressed.shape[0], compressed.shape[1] * 2
    if isinstance(shape, Tensor):  # a meta tensor says nothing
        shape = (rows, columns) if shape.is_meta else shape.flatten().tolist()
    mask = [rows, _mask_bytes(columns)]
    if list(shape) != [rows, columns] or list(bitmask.shape) != mask or columns % 4:
        raise ValueError(
            f"compressed {list(compressed.shape)}, bitmask {list(bitmask.shape)} and "
            f"shape {list(shape)} disagree; expected [R, C / 2], [R, ceil(C / 8)] and "
            "[R, C]"
        )
    if bitmask.dtype != torch.uint8:
        raise ValueError(f"the bitmask is {bitmask.dtype}; expected torch.uint8")
    _bits(compressed)
    return rows, columns


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers."""
    if tensor.element_size() not in _BITS:
        raise ValueError(
            f"{tensor.dtype} has {tensor.element_size()} bytes per entry; expected 1, "
            "2 or 4"
        )
    return tensor.view(_BITS[tensor.element_size()])


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows done at once: all on an accelerator, what a cache holds on a CPU."""
    if matrix.is_meta or not matrix.numel():
        return
    rows = len(matrix)
    step = max(1, _BLOCK // matrix.shape[1]) if matrix.device.type == "cpu" else rows
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _codes(flags: Tensor) -> Tensor:
    """bool [r, C] -> int32 codes [r, C / 4]"""
    # four bytes that are 0 or 1 as one integer; the product has bit j of the code at
    # bit 24 + j, and no carries
    words = flags.contiguous().view(torch.int32)
    return (words * 0x01020408) >> 24 & 15


def _bytes(codes: Tensor) -> Tensor:
    """codes [r, C / 4] -> uint8 [r, ceil(C / 8)]"""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _codes_of_bytes(mask: Tensor, columns: int) -> Tensor:
    """uint8 [r, ceil(C / 8)] -> int32 codes [r, C / 4]

    :raises NotTwoOfFourError: if a spare bit is set
    """
    codes = torch.stack((mask & 15, mask >> 4), -1).flatten(1).int()
    if bool(codes[:, columns // 4 :].any()):
        raise NotTwoOfFourError(f"the bitmask has bits set beyond column {columns}")
    return codes[:, : columns // 4]


def _filled(codes: Tensor) -> Tensor:
    table = _FILLED.to(codes)
    return table.index_select(0, codes.flatten()).view(codes.shape)


def _columns(codes: Tensor) -> Tensor:
    """codes [r, C / 4] -> int64 [groups, 2]"""
    return _COLUMNS.to(codes.device).index_select(0, codes.flatten())


def _mask_bytes(columns: int) -> int:
    return -(-columns // 8)


def _refuse(wrong: Tensor, block: slice, found: str) -> None:
    """:param wrong: bool [r, C / 4], of the block of rows"""
    if not bool(wrong.any()):
        return
    row, group = wrong.nonzero()[0].tolist()
    raise NotTwoOfFourError(
        f"not 2:4: row {block.start + row} has {found} in columns {4 * group} to "
        f"{4 * group + 3}"
    )
