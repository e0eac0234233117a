"""Make the forms in which the CPU kernels read a weight; once, at load.

Bytes relative to dense, for a share ``density`` of kept entries:

* 2:4: 0.5625 in bf16, 0.625 in int8;
* any mask: ``density + 1/16`` in bf16, ``density + 1/8`` in int8.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import NotTwoOfFourError
from llmc_attnmask.serving.kernels.cpu import library

ROWS = 16  # of a unit
UNIT = 64  # bytes
TILE_COLUMNS = 32  # of a 2:4 weight
LARGEST_COLUMNS = 1 << 16  # of int8: the sums of K products fit into 32 bits
DTYPES = (torch.bfloat16, torch.int8)


class Weight(NamedTuple):
    """A weight [rows, columns] for the operator: ``tiles``, or the other three."""

    rows: int
    columns: int
    tiles: Tensor | None = None  # uint8 [pairs of 16 rows, tiles, 2, bytes], 2:4
    masks: Tensor | None = None  # uint8 [groups of 16 rows, units, 4 or 8], any mask
    values: Tensor | None = None  # kept entries, in the weight's dtype, then 64 bytes
    starts: Tensor | None = None  # int64 [groups], where their values start

    @property
    def nbytes(self) -> int:
        """The bytes that one product reads."""
        return sum(form.nbytes for form in self[2:] if form is not None)


def two_of_four(weight: Tensor) -> Weight:
    """Make the form of a 2:4 weight.

    :param weight: bf16 or int8 [rows, columns], contiguous, columns a multiple of 4
    :raises NotTwoOfFourError: if it is not 2:4
    :raises ValueError: for other dtypes and shapes
    """
    rows, columns = _checked(weight)
    if columns % 4:
        raise NotTwoOfFourError(
            f"{columns} inputs are not divisible by 4, so there are no groups of four"
        )
    pairs, tiles = -(-rows // (2 * ROWS)), -(-columns // TILE_COLUMNS)
    values = TILE_COLUMNS // 2 * weight.itemsize * ROWS
    form = torch.zeros(pairs, tiles, 2, UNIT + values, dtype=torch.uint8)
    pack = library.function("two_of_four", weight.dtype, "_pack")
    if pack(weight.data_ptr(), rows, columns, form.data_ptr()):
        raise NotTwoOfFourError("more than two of four entries are not +0.0")
    return Weight(rows, columns, tiles=form)


def any_mask(weight: Tensor) -> Weight:
    """Make the form of a weight with any mask: what is not +0.0 is kept.

    :param weight: bf16 or int8 [rows, columns], contiguous
    :raises ValueError: for other dtypes and shapes
    """
    rows, columns = _checked(weight)
    groups = -(-rows // ROWS)
    units = -(-columns * weight.itemsize // 4)
    counts = torch.empty(groups, dtype=torch.int64)
    library.function("any_mask", weight.dtype, "_count")(
        weight.data_ptr(), rows, columns, counts.data_ptr()
    )
    starts = counts.cumsum(0) - counts
    padding = UNIT // weight.itemsize  # a unit is read as a whole
    values = weight.new_zeros(int(counts.sum()) + padding)
    masks = torch.empty(groups, units, 8 // weight.itemsize, dtype=torch.uint8)
    library.function("any_mask", weight.dtype, "_pack")(
        weight.data_ptr(),
        *(rows, columns, starts.data_ptr(), masks.data_ptr(), values.data_ptr()),
    )
    return Weight(rows, columns, masks=masks, values=values, starts=starts)


def _checked(weight: Tensor) -> tuple[int, int]:
    fits = weight.ndim == 2 and weight.dtype in DTYPES and weight.is_contiguous()
    if not fits or weight.device.type != "cpu":
        raise ValueError(
            f"the weight is {weight.dtype} {list(weight.shape)} on {weight.device}; "
            "expected a contiguous matrix in bfloat16 or int8 on the CPU"
        )
    rows, columns = weight.shape
    if weight.dtype == torch.int8 and columns > LARGEST_COLUMNS:
        raise ValueError(
            f"{columns} inputs; expected at most {LARGEST_COLUMNS} in int8"
        )
    return rows, columns
