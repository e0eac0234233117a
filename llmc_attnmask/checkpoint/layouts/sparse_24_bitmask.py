"""The ``sparse-24-bitmask`` encoding of a 2:4 matrix: two values of every four inputs.

compressed-tensors up to 0.14 wrote it, and vLLM up to 0.18.1 reads it. A weight [R, C]
becomes

- ``compressed`` [R, C / 2]: the kept values, row by row, in the weight's dtype;
- ``bitmask`` uint8 [R, ceil(C / 8)]: the columns that are kept, as in ``bits.py``;
- ``shape`` int64 [2, 1]: R and C.

Exactly two entries of every four are kept; a group with more than two zeros keeps some
of them, the same ones as compressed-tensors on a CPU. Everything works on bits, so that
NaN payloads, -0.0 and the int8 -128 survive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import (
    bits_of,
    codes_of,
    mask_bytes,
    row_blocks,
)

NAME: Final = "sparse-24-bitmask"

# The flags of a group of four form a code below 16; column j of the group is its bit j.
# This table gives, by code, the code with exactly two bits set, or 0 if more are set.
# Fewer bits are filled up to two as torch's topk(2) on a CPU breaks ties, which is how
# compressed-tensors chose.
_FILLED = [12, 5, 10, 3, 12, 5, 6, 0, 12, 9, 10, 0, 12, 0, 0, 0]


class NotTwoOfFourError(ValueError):
    """A matrix or mask does not keep two entries of every four."""


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
    :param kept: bool [R, C], exactly two of every four consecutive columns; all other
        entries are dropped, whatever their value. By default, all entries that are not
        +0.0 are kept, and as many zeros as it takes to make two
    :raises NotTwoOfFourError: if a group has more than two entries that are not +0.0
        or, with a mask, if the mask does not keep exactly two
    :raises ValueError: for other shapes and dtypes
    """
    rows, columns = _checked_shape(weight)
    if kept is not None and (kept.shape != weight.shape or kept.dtype != torch.bool):
        raise ValueError(
            f"the mask is {kept.dtype} {list(kept.shape)}; expected torch.bool "
            f"{list(weight.shape)}, the shape of the weight"
        )
    compressed = weight.new_empty(rows, columns // 2)
    bitmask = weight.new_empty(rows, mask_bytes(columns), dtype=torch.uint8)
    unit = _unit_of(weight)
    for block in row_blocks(weight):
        bits = bits_of(weight[block])
        # on integers, `bool` gives the same as `!= 0`, many times faster
        codes = codes_of(bits.bool() if kept is None else kept[block], unit.columns)
        filled = unit.filled.index_select(0, codes)
        if kept is None:
            _refuse(filled == 0, block, unit, "more than two entries that are not +0.0")
        else:
            _refuse(filled != codes, block, unit, "more or fewer than two kept entries")
        columns_kept = unit.kept.index_select(0, codes)
        values = bits.reshape(-1, unit.columns).gather(1, columns_kept)
        bits_of(compressed[block]).copy_(values.view(-1, columns // 2))
        bitmask[block] = unit.bytes(filled, columns)
    return Packed(compressed, bitmask, torch.tensor([[rows], [columns]]))


@torch.no_grad()
def unpack(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int]
) -> Tensor:
    """Decode what ``pack`` wrote; entries that are not kept are +0.0.

    :param compressed: [R, C / 2] of 1, 2 or 4 bytes per entry; a meta tensor gives a
        meta tensor
    :param bitmask: uint8 [R, ceil(C / 8)]
    :param shape: R and C
    :return: [R, C], with the dtype and device of ``compressed``
    :raises ValueError: if the shapes disagree
    :raises NotTwoOfFourError: if the bitmask does not have exactly two bits per group
    """
    rows, columns = _agreed_shape(compressed, bitmask, shape)
    weight = compressed.new_empty(rows, columns)
    for block in row_blocks(weight):
        values = bits_of(compressed[block])
        _scatter(bitmask[block], values, bits_of(weight[block]), block)
    return weight


@torch.no_grad()
def crowded_groups(weight: Tensor) -> int:
    """Count the groups of four with more than two entries that are not +0.0.

    0 means that the weight is 2:4.

    :param weight: as for ``pack``
    """
    _checked_shape(weight)
    unit = _unit_of(weight)
    return sum(
        int(
            unit.crowded.index_select(
                0, codes_of(bits_of(weight[block]).bool(), unit.columns)
            ).sum()
        )
        for block in row_blocks(weight)
    )


def _checked_shape(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2:
        raise ValueError(f"the weight is {list(weight.shape)}; expected two dimensions")
    bits_of(weight)
    if weight.shape[1] % 4:
        raise NotTwoOfFourError(
            f"{weight.shape[1]} inputs are not divisible by 4, so there are no groups "
            "of four"
        )
    return weight.shape[0], weight.shape[1]


def check_shapes(
    compressed: Sequence[int], bitmask: Sequence[int], shape: Sequence[int] | Tensor
) -> None:
    """Refuse parts that do not belong to one weight.

    :param compressed: the shape of ``compressed``
    :param bitmask: the shape of ``bitmask``
    :param shape: the content of ``shape``, R and C
    :raises ValueError: if they disagree; the message shows all three
    """
    if len(compressed) != 2:
        raise ValueError(f"compressed is {list(compressed)}; expected two dimensions")
    rows, columns = compressed[0], compressed[1] * 2
    found = shape.tolist() if isinstance(shape, Tensor) else list(shape)
    mask = [rows, mask_bytes(columns)]
    if found != [rows, columns] or list(bitmask) != mask or columns % 4:
        raise ValueError(
            f"compressed {list(compressed)}, bitmask {list(bitmask)} and shape {found} "
            "disagree; expected [R, C / 2], [R, ceil(C / 8)] and [R, C]"
        )


def _agreed_shape(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int]
) -> tuple[int, int]:
    if isinstance(shape, Tensor) and shape.is_meta:  # it holds no values
        shape = [n * (i + 1) for i, n in enumerate(compressed.shape)]
    if isinstance(shape, Tensor):
        shape = shape.flatten()
    check_shapes(compressed.shape, bitmask.shape, shape)
    if bitmask.dtype != torch.uint8:
        raise ValueError(f"the bitmask is {bitmask.dtype}; expected torch.uint8")
    bits_of(compressed)
    return compressed.shape[0], compressed.shape[1] * 2


@dataclass(frozen=True)
class _Unit:
    """One or two groups whose flags form one code and are looked up together."""

    columns: int  # 4 or 8
    filled: Tensor  # uint8 [codes]: with exactly two of each group; 0 if one has more
    crowded: Tensor  # uint8 [codes]: how many groups have more than two
    kept: Tensor  # int64 [codes, columns / 2]: the columns that the code keeps

    @classmethod
    def of(cls, columns: int) -> "_Unit":
        filled, crowded, kept = [], [], []
        for code in range(1 << columns):
            groups = [_FILLED[code >> start & 15] for start in range(0, columns, 4)]
            code = sum(group << 4 * i for i, group in enumerate(groups))
            filled.append(code if all(groups) else 0)
            crowded.append(groups.count(0))
            set_bits = [j for j in range(columns) if filled[-1] >> j & 1]
            kept.append(set_bits + [0] * (columns // 2 - len(set_bits)))
        return cls(
            columns,
            torch.tensor(filled, dtype=torch.uint8),
            torch.tensor(crowded, dtype=torch.uint8),
            torch.tensor(kept),
        )

    def to(self, device: torch.device) -> "_Unit":
        tables = (table.to(device) for table in (self.filled, self.crowded, self.kept))
        return _Unit(self.columns, *tables)

    def bytes(self, codes: Tensor, columns: int) -> Tensor:
        """Turn uint8 codes [r * C / columns] into bitmasks, uint8 [r, ceil(C / 8)]."""
        codes = codes.view(-1, columns // self.columns)
        if self.columns == 8:
            return codes
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, ::2] | codes[:, 1::2] << 4

    def codes_of_bytes(self, mask: Tensor, columns: int) -> Tensor:
        """Turn bitmasks, uint8 [r, ceil(C / 8)], into uint8 codes [r * C / columns].

        :raises NotTwoOfFourError: if a spare bit is set
        """
        if self.columns == 8:
            return mask.flatten()
        codes = torch.stack((mask & 15, mask >> 4), -1).flatten(1)
        if bool(codes[:, columns // 4 :].any()):
            raise NotTwoOfFourError(f"the bitmask has bits set beyond column {columns}")
        return codes[:, : columns // 4].flatten()


_UNITS = {columns: _Unit.of(columns) for columns in (4, 8)}


def _unit_of(matrix: Tensor) -> _Unit:
    unit = _UNITS[4 if matrix.shape[1] % 8 else 8]
    return unit if matrix.device.type in ("cpu", "meta") else unit.to(matrix.device)


def _scatter(mask: Tensor, values: Tensor, out: Tensor, block: slice) -> None:
    """Put values [r, C / 2] where the mask [r, ceil(C / 8)] is set, zeros elsewhere.

    :param out: [r, C], contiguous
    """
    unit = _unit_of(out)
    codes = unit.codes_of_bytes(mask, out.shape[1]).int()
    filled = unit.filled.index_select(0, codes)
    _refuse(filled != codes, block, unit, "more or fewer than two bits set")
    half = unit.columns // 2
    out.zero_().view(-1, unit.columns).scatter_(
        1, unit.kept.index_select(0, codes), values.reshape(-1, half)
    )


def _refuse(wrong: Tensor, block: slice, unit: _Unit, found: str) -> None:
    """Raise for the first wrong unit, if there is one.

    :param wrong: bool [r * C / unit.columns], of the block of rows
    :param found: what a wrong group has, for the message
    """
    if not bool(wrong.any()):
        return
    per_row = len(wrong) // (block.stop - block.start)
    row, column = divmod(int(wrong.nonzero()[0]), per_row)
    first = column * unit.columns
    raise NotTwoOfFourError(
        f"not 2:4: row {block.start + row} has {found} in a group of four within "
        f"columns {first} to {first + unit.columns - 1}"
    )
