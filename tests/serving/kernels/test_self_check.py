import pytest
import torch

from llmc_attnmask.serving.kernels import packing, select, self_check
from tests.interpreter import interpreted
from tests.serving.kernels.matrices import DTYPES, random_2of4

pytest.importorskip("triton")
pytestmark = interpreted


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(self_check, "_known", {})


def layer(dtype: torch.dtype) -> tuple:
    """Dense weight, values, places, no cuSPARSELt, scales, tokens, dtype of tokens."""
    torch.manual_seed(0)
    weight = random_2of4(300, 64, dtype)
    values, places = packing.pack(weight)
    scale = torch.rand(300) + 0.1 if dtype.itemsize == 1 else None
    x_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return weight, values, places, None, scale, select.NO_LIMIT, x_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decode_kernel_passes(dtype):
    assert self_check.failure(*layer(dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_places_are_noticed(dtype):
    weight, values, places, *rest = layer(dtype)
    reason = self_check.failure(weight, values, places.flip(0), *rest)
    assert reason is not None and "of the norm at 1 tokens" in reason


def test_not_a_number_is_noticed():
    weight, values, *rest = layer(torch.bfloat16)
    values[0, 0] = float("nan")
    assert "off by nan" in str(self_check.failure(weight, values, *rest))


def test_a_kernel_that_raises_is_noticed_and_tried_once(monkeypatch):
    weight, values, places, _, scale, _, dtype = layer(torch.bfloat16)
    tried = []

    def fail(x, *_):
        tried.append(len(x))
        raise RuntimeError("no such kernel in this driver")

    monkeypatch.setattr(self_check, "sparse_linear", fail)
    for _ in range(2):
        reason = self_check.failure(weight, values, places, weight, scale, 4, dtype)
        assert reason == "RuntimeError at 1 tokens: no such kernel in this driver"
    assert tried == [1, 5]
