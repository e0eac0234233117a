import pytest
import torch

from llmc_attnmask.serving.kernels import packing
from tests.support.kernels.matrices import DTYPES, random_2of4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [8, 256, 264, 1032])
def test_unpack_restores_every_bit(dtype, columns):
    torch.manual_seed(0)
    weight = random_2of4(5, columns, dtype)
    values, indices = packing.pack(weight)
    assert torch.equal(
        packing.unpack(values, indices).view(torch.uint8), weight.view(torch.uint8)
    )


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 9), (torch.int8, 10)])
def test_the_size_in_bytes_is_as_documented(dtype, share):
    weight = random_2of4(4, 512, dtype)
    packed = sum(part.nbytes for part in packing.pack(weight))
    assert packed * 16 == weight.nbytes * share


def test_a_byte_holds_two_groups_of_one_chunk():
    weight = torch.zeros(1, 512, dtype=torch.bfloat16)
    weight[0, 4 * 3 + 1] = weight[0, 4 * 3 + 3] = 1  # group 3 of the first chunk
    weight[0, 4 * 35 + 2] = weight[0, 4 * 35 + 3] = 1  # group 35: its high half
    _, indices = packing.pack(weight)
    assert indices.shape == (1, 64)
    assert indices[0, 3] == (1 | 3 << 2) | (2 | 3 << 2) << 4


def test_a_weight_that_is_not_2of4_is_refused():
    with pytest.raises(ValueError, match="not 2:4"):
        packing.pack(torch.ones(4, 8))
    with pytest.raises(ValueError, match="12 columns"):
        packing.pack(torch.zeros(4, 12))
