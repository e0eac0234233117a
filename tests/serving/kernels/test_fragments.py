"""Against the PTX manual's figures, written out for each lane."""

import pytest
import torch

from llmc_attnmask.serving.kernels import fragments, packing
from tests.serving.kernels.matrices import DTYPES, random_2of4

UNUSED = 4


def word(nibbles, places):
    """Eight nibbles, from the lowest; places are (row, group)."""
    found = 0
    for i, (row, group) in enumerate(places):
        inside = row < nibbles.shape[0] and group < nibbles.shape[1]
        found |= int(nibbles[row, group] if inside else UNUSED) << (4 * i)
    return found - (1 << 32) if found >> 31 else found


def manual(dtype, tile, block, lane):
    """The (row, group) of the nibbles in a lane's word of 32 columns, or for 8 bits of
    the product of 16 rows ``block % 2`` in 64 columns ``block // 2``.
    """
    g, t = lane // 4, lane % 4
    if dtype.itemsize == 2:
        row = 32 * tile + 16 * (t // 2) + g
        return [
            (row + 8 * h, 8 * block + 4 * (t % 2) + j) for h in (0, 1) for j in range(4)
        ]
    first = 32 * tile + 16 * (block % 2) + g
    groups = 16 * (block // 2)
    if dtype == torch.int8:
        return [(first + 8 * (t % 2), groups + 8 * (t // 2) + j) for j in range(8)]
    return [
        (first + 8 * h, groups + 2 * (4 * (t % 2) + j) + t // 2)
        for h in (0, 1)
        for j in range(4)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (70, 288)])
def test_every_lane_gets_the_groups_that_the_manual_says(dtype, rows, columns):
    torch.manual_seed(0)
    _, nibbles = packing.kept(random_2of4(rows, columns, dtype))
    found = fragments.metadata(nibbles, dtype)
    stage = fragments.STAGE[dtype.itemsize]
    assert found.dtype == torch.int32
    assert found.shape == (4, -(-columns // stage) * stage // 32, 32)
    for tile, block, lane in torch.cartesian_prod(
        *map(torch.arange, found.shape)
    ).tolist():
        expected = word(nibbles, manual(dtype, tile, block, lane))
        assert found[tile, block, lane] == expected, (tile, block, lane)


def test_kept_places_are_in_order():
    weight = torch.zeros(1, 8, dtype=torch.bfloat16)
    weight[0, 1] = weight[0, 3] = weight[0, 6] = weight[0, 7] = 1
    values, nibbles = packing.kept(weight)
    assert values.tolist() == [[1, 1, 1, 1]]
    assert nibbles.tolist() == [[1 | 3 << 2, 2 | 3 << 2]]
