import copy

import pytest
import torch

from llmc_attnmask.masks.record import clear_mask, count_violations, get_mask, set_mask


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 130)])
def test_a_mask_is_restored_bit_for_bit(shape):
    linear = torch.nn.Linear(shape[1], shape[0])
    kept = torch.rand(shape) < 0.5
    assert get_mask(linear) is None
    set_mask(linear, kept)
    assert torch.equal(get_mask(linear), kept)
    clear_mask(linear)
    clear_mask(linear)
    assert get_mask(linear) is None


def test_a_second_mask_keeps_entries_of_the_first_one_pruned():
    linear = torch.nn.Linear(8, 4)
    first, second = torch.rand(2, 4, 8) < 0.5
    set_mask(linear, first)
    set_mask(linear, second)
    assert torch.equal(get_mask(linear), first & second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_pruned_entries_that_are_not_zero_are_counted(dtype):
    linear = torch.nn.Linear(13, 7)
    assert count_violations(linear) == 0
    kept = torch.rand(7, 13) < 0.5
    kept[0, 0], kept[6, 12], kept[3, 5] = False, False, False
    weight = torch.ones(7, 13).masked_fill(~kept, 0.0)
    linear.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    set_mask(linear, kept)
    assert count_violations(linear) == 0
    weight[0, 0], weight[6, 12], weight[3, 5] = -1.0, float("nan"), -0.0
    linear.weight.data = weight.to(dtype)
    assert count_violations(linear) == 2


def test_a_mask_is_not_in_the_state_dict_but_is_copied():
    linear = torch.nn.Linear(8, 4)
    kept = torch.rand(4, 8) < 0.5
    set_mask(linear, kept)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert torch.equal(get_mask(copy.deepcopy(linear)), kept)


@pytest.mark.parametrize("kept", [torch.ones(4, 8), torch.ones(8, 4).bool()])
def test_a_tensor_that_is_not_a_mask_of_the_weight_is_refused(kept):
    with pytest.raises(ValueError, match=r"not a mask for this weight.*\(4, 8\)"):
        set_mask(torch.nn.Linear(8, 4), kept)
