"""Against CUTLASS's layout, written out as strides; and the round trip."""

import pytest
import torch

from llmc_attnmask.serving.kernels import fragments, packing
from tests.support.kernels.matrices import DTYPES, random_2of4

UNUSED = 4


def address(row, group, rows, itemsize, span):
    """The offset of a nibble, in nibbles: modes of (row, column) from the fastest on,
    in the order of sm90_sparse_config.inl.
    """
    if itemsize == 2:  # atom of 64 rows and 32 * span columns
        within = [
            (group % 4, 4),
            (row // 8 % 2, 2),
            (group // 8 % span, span),
            (row % 8, 8),
            (group // 4 % 2, 2),
            (row // 16 % 4, 4),
        ]
        atom = group // (8 * span)
    else:  # atom of 64 rows and 64 * span columns, row by row
        within = [(group % (16 * span), 16 * span), (row % 64, 64)]
        atom = group // (16 * span)
    found, stride = 0, 1
    for position, size in within:
        found += position * stride
        stride *= size
    return found + (row // 64 + atom * (rows // 64)) * stride


@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("span", fragments.SPANS)
def test_nibbles_are_where_cutlass_puts_them(itemsize, span):
    torch.manual_seed(0)
    rows, groups = 256, 128
    nibbles = torch.randint(16, (rows, groups), dtype=torch.uint8)
    found = fragments.metadata(nibbles, itemsize, span)
    halves = torch.stack((found & 15, found >> 4), dim=-1).flatten()
    for row, group in torch.cartesian_prod(torch.arange(rows), torch.arange(groups)):
        at = address(int(row), int(group), rows, itemsize, span)
        assert halves[at] == nibbles[row, group], (row, group)
    back = fragments.nibbles(found, rows, 4 * groups, itemsize, span)
    assert torch.equal(back, nibbles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_are_padded_with_valid_indices(dtype):
    torch.manual_seed(0)
    _, nibbles = packing.kept(random_2of4(70, 288, dtype))
    found = fragments.metadata(nibbles, dtype.itemsize)
    columns = (
        -(-288 // fragments.STAGE[dtype.itemsize]) * fragments.STAGE[dtype.itemsize]
    )
    back = fragments.nibbles(found, 128, columns, dtype.itemsize, 1)
    assert torch.equal(back[:70, :72], nibbles)
    assert back[70:].eq(UNUSED).all() and back[:, 72:].eq(UNUSED).all()


def test_kept_indices_are_in_order():
    weight = torch.zeros(1, 8, dtype=torch.bfloat16)
    weight[0, 1] = weight[0, 3] = weight[0, 6] = weight[0, 7] = 1
    values, nibbles = packing.kept(weight)
    assert values.tolist() == [[1, 1, 1, 1]]
    assert nibbles.tolist() == [[1 | 3 << 2, 2 | 3 << 2]]
