import pytest
import torch

from llmc_attnmask.checkpoint.layouts import sparse_24_bitmask
from llmc_attnmask.serving import made_up
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_smallest_of_every_four_are_zeroed_in_place(dtype, monkeypatch):
    monkeypatch.setattr(made_up, "_ENTRIES", 64)  # several blocks and a remainder
    torch.manual_seed(0)
    weight = random_values((12, 24), dtype)
    before = weight.float().view(-1, 4)
    made_up.prune(weight)
    after = weight.float().view(-1, 4)
    assert sparse_24_bitmask.crowded_groups(weight) == 0
    assert torch.equal(after[after != 0], before[after != 0])
    dropped = before.abs().masked_fill(after != 0, 0).amax(-1)
    kept = before.abs().masked_fill(after == 0, torch.inf).amin(-1)
    assert (dropped <= kept).all()


def test_negative_zeros_become_positive_zeros():
    # rounding to fp8 produces such zeros
    weight = torch.full((4, 8), -0.0).to(torch.float8_e4m3fn)
    assert sparse_24_bitmask.crowded_groups(weight)
    made_up.prune(weight)
    assert not sparse_24_bitmask.crowded_groups(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_2of4_weights_stay_as_they_are(dtype):
    weight = random_2of4(8, 32, dtype)
    kept = weight.clone()
    made_up.prune(weight)
    assert torch.equal(weight.float(), kept.float())
