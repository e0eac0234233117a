"""The indices of a 2:4 weight, in the order in which sparse tensor cores take them.

A group of four columns has a nibble: ``first | second << 2``, the kept columns. A lane
of a warp passes ``mma.sp`` a word of eight nibbles; the PTX manual specifies which ones
(matrix fragments for sparse ``mma.m16n8k32`` and ``mma.m16n8k64``). They are stored so
that a lane finds its word in one piece, in the order of CUTLASS's
``Sm90GemmSparseConfig`` (sm90_sparse_config.inl), which cuSPARSELt may also use. From
the slowest to the fastest dimension:

* spans of ``span`` steps of columns, a step being 32 columns in 16 bits and 64 in 8;
* tiles of 32 rows;
* 16 bits: upper or lower 16 rows, first or second four groups of a step, row g of
  eight, step of the span, then a word: four groups of row g, and of row g + 8;
* 8 bits: row of 32, step of the span, then two words: the 16 groups of a step.

Four bits per group are 1/16 of a dense weight's bytes in 16 bits, and 1/8 in 8 bits.
"""

import torch
from torch import Tensor

ROWS = 128  # rows are padded to a multiple of this, the kernel's largest block
STAGE = {2: 128, 1: 256}  # the same for columns, by bytes per entry
SPANS = (1, 2, 4)  # that the kernel can read
STEPS = 4  # of a stage
TILE = 32  # rows
_UNUSED = 4  # nibble of a padding group: columns 0 and 1


def metadata(nibbles: Tensor, itemsize: int, span: int = 1) -> Tensor:
    """Store nibbles in the order in which the kernel reads them.

    :param nibbles: uint8 [rows, K/4], from ``packing.kept``
    :param itemsize: bytes per entry of the weight
    :return: uint8 [bytes]; rows are padded to a multiple of 128, columns to one of 128
        (16 bits) or 256 (8 bits)
    """
    groups = STAGE[itemsize] // 4
    rows_left, groups_left = -nibbles.shape[0] % ROWS, -nibbles.shape[1] % groups
    filled = torch.nn.functional.pad(
        nibbles, (0, groups_left, 0, rows_left), value=_UNUSED
    )
    tiles = filled.shape[0] // TILE
    if itemsize == 2:  # tile, 16 rows, 8 rows, g; span, step, four groups
        axes = filled.view(tiles, 2, 2, 8, -1, span, 2, 4)
        ordered = axes.permute(4, 0, 1, 6, 3, 5, 2, 7)
    else:
        ordered = filled.view(tiles, TILE, -1, span * 16).permute(2, 0, 1, 3)
    pairs = ordered.reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def nibbles(
    metadata: Tensor, rows: int, columns: int, itemsize: int, span: int
) -> Tensor:
    """Read the nibbles back from stored metadata, for shapes that need no padding.

    :param metadata: uint8 [rows * columns / 8]
    :param rows: a multiple of 32
    :param columns: a multiple of ``span`` steps
    :return: uint8 [rows, columns / 4]
    """
    halves = torch.stack((metadata & 15, metadata >> 4), dim=-1)
    tiles = rows // TILE
    if itemsize == 2:
        ordered = halves.view(-1, tiles, 2, 2, 8, span, 2, 4)
        axes = ordered.permute(1, 2, 6, 4, 0, 5, 3, 7)
    else:
        axes = halves.view(-1, tiles, TILE, span * 16).permute(1, 2, 0, 3)
    return axes.reshape(rows, columns // 4)
