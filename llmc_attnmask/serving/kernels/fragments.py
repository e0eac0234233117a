"""Where the kept values of a 2:4 weight are, as sparse tensor cores want to be told.

``mma.sp`` takes from every lane of a warp a word of eight nibbles, each a group of four
columns: ``first | second << 2``. Which groups a lane tells of is laid down in the PTX
manual (matrix fragments for sparse ``mma.m16n8k32`` and ``mma.m16n8k64``). With lane
``4 g + t``:

* 16 bits, 32 columns: one word serves two products of 16 rows, the first of which reads
  the lanes t = 0 and 1, the second t = 2 and 3. Bits 0 to 15 are row g of the 16, bits
  16 to 31 row g + 8; t even has the first four groups, t odd the others.
* int8, 64 columns: a word for each product, of row ``g + 8 (t % 2)``, and of the first
  eight groups for t < 2, the others for t > 1.
* fp8, 64 columns, multiplied as fp16 in two products (see ``cuda_decode.cu``): a word
  as in 16 bits, but t < 2 tells of the even groups, t > 1 of the odd ones.

Four bits a group: 1/16 of a dense weight's bytes in 16 bits, 1/8 in 8 bits.
"""

import torch
from torch import Tensor

ROWS = 128  # rows are filled up to a multiple: of the kernel's largest block
STAGE = {2: 128, 1: 256}  # columns likewise, by bytes per entry
LANES = 32
_UNUSED = 4  # nibble of a group that is not there: columns 0 and 1


def metadata(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The words of all lanes, in the order in which the kernel reads them.

    :param nibbles: uint8 [rows, K/4], of ``packing.kept``
    :param dtype: of the weight: fp16, bf16, int8 or fp8 e4m3
    :return: int32 [tiles of 32 rows, columns / 32, 32], with rows filled up to a
        multiple of 128 and columns to one of 128 (16 bits) or 256 (8 bits)
    """
    rows, groups = nibbles.shape
    columns = STAGE[dtype.itemsize]
    filled = torch.nn.functional.pad(
        nibbles, (0, -groups % (columns // 4), 0, -rows % ROWS), value=_UNUSED
    )
    tiles = filled.shape[0] // LANES
    # axes: tile of 32 rows, product of 16, upper or lower 8, g; step, groups within
    if dtype.itemsize == 2:
        axes = filled.view(tiles, 2, 2, 8, -1, 2, 4)
        ordered = axes.permute(0, 4, 3, 1, 5, 2, 6)  # step, g, product, t % 2, half
    elif dtype == torch.int8:
        axes = filled.view(tiles, 2, 2, 8, -1, 2, 8)
        ordered = axes.permute(0, 4, 1, 3, 5, 2, 6)  # step, product, g, t > 1, t % 2
    else:
        axes = filled.view(tiles, 2, 2, 8, -1, 2, 4, 2)
        ordered = axes.permute(0, 4, 1, 3, 7, 5, 2, 6)  # step, product, g, odd, t % 2
    lanes = ordered.reshape(tiles, -1, LANES, 4, 2)
    return (lanes[..., 0] | lanes[..., 1] << 4).view(torch.int32).squeeze(-1)
