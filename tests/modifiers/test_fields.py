import pytest
import torch
from torch import nn

from llmc_attnmask.modifiers.fields import check_finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("position", [0, 7, 63])
def test_a_single_value_that_is_not_finite_is_found(value, dtype, position):
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
    model[0].weight.data.view(-1)[position] = value
    with pytest.raises(ValueError, match=r"0\.weight has 1 NaN or infinite entries"):
        check_finite(model)


def test_extreme_values_and_empty_weights_are_accepted():
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    model.weight.data[0, :2] = torch.tensor([-largest, largest])
    model.empty = nn.Parameter(torch.zeros(0, 4))
    check_finite(model)
