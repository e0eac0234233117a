import copy

import pytest
import torch

from llmc_attnmask.masks.record import forget, recall, remember


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 16), (7, 130)])
def test_a_mask_is_recalled_bit_for_bit(shape):
    linear = torch.nn.Linear(shape[1], shape[0])
    kept = torch.rand(shape) < 0.5
    assert recall(linear) is None
    remember(linear, kept)
    assert torch.equal(recall(linear), kept)
    forget(linear)
    forget(linear)
    assert recall(linear) is None


def test_a_second_mask_leaves_pruned_what_the_first_one_pruned():
    linear = torch.nn.Linear(8, 4)
    first, second = torch.rand(2, 4, 8) < 0.5
    remember(linear, first)
    remember(linear, second)
    assert torch.equal(recall(linear), first & second)


def test_a_mask_is_no_part_of_the_state_but_goes_with_a_copy():
    linear = torch.nn.Linear(8, 4)
    kept = torch.rand(4, 8) < 0.5
    remember(linear, kept)
    assert set(linear.state_dict()) == {"weight", "bias"}
    assert torch.equal(recall(copy.deepcopy(linear)), kept)


@pytest.mark.parametrize("kept", [torch.ones(4, 8), torch.ones(8, 4).bool()])
def test_what_is_no_mask_of_the_weight_is_refused(kept):
    with pytest.raises(ValueError, match=r"no mask for this weight.*\(4, 8\)"):
        remember(torch.nn.Linear(8, 4), kept)
