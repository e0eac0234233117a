import pytest
import torch

from llmc_attnmask.serving.kernels import packing, select, self_check
from llmc_attnmask.serving.kernels.forms import Forms
from llmc_attnmask.serving.kernels.op import sparse_linear
from tests.support.interpreter import interpreted
from tests.support.kernels.matrices import DTYPES, random_2of4

pytest.importorskip("triton")
pytestmark = interpreted


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(self_check, "_known", {})


def layer(dtype: torch.dtype) -> tuple:
    """Dense weight, forms of the Triton kernel, scales, tokens, dtype of tokens."""
    torch.manual_seed(0)
    weight = random_2of4(300, 64, dtype)
    values, indices = packing.pack(weight)
    scale = torch.rand(300) + 0.1 if dtype.itemsize == 1 else None
    x_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    forms = Forms(values, indices, None, None)
    return weight, forms, scale, select.NO_LIMIT, x_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decode_kernel_passes(dtype):
    assert self_check.failure(*layer(dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_indices_are_noticed(dtype):
    weight, forms, *rest = layer(dtype)
    wrong = forms._replace(indices=forms.indices.flip(0))
    reason = self_check.failure(weight, wrong, *rest)
    assert reason is not None and "relative error" in reason and "at 1 tokens" in reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_last_row_is_noticed(dtype, monkeypatch):
    weight, forms, *rest = layer(dtype)

    def incomplete(*arguments):
        out = sparse_linear(*arguments)
        out[:, -30:] = 0  # of 300
        return out

    monkeypatch.setattr(self_check, "sparse_linear", incomplete)
    assert "relative error" in str(self_check.failure(weight, forms, *rest))


def test_missing_inputs_are_noticed(monkeypatch):
    torch.manual_seed(0)
    columns = 14336
    weight = random_2of4(64, columns, torch.bfloat16)

    def incomplete(x, *_):
        return torch.nn.functional.linear(x[:, 128:], weight[:, 128:])

    monkeypatch.setattr(self_check, "sparse_linear", incomplete)
    forms = Forms(None, None, None, weight)
    reason = self_check.failure(weight, forms, None, 64, torch.bfloat16)
    assert "relative error 0.09" in str(reason)


def test_leftovers_of_an_earlier_call_are_noticed(monkeypatch):
    weight, forms, *rest = layer(torch.bfloat16)
    calls = []

    def forgetful(*arguments):
        calls.append(1)
        return sparse_linear(*arguments) * (1 if len(calls) == 1 else 0)

    monkeypatch.setattr(self_check, "sparse_linear", forgetful)
    assert "relative error 1 at 1 tokens" in str(
        self_check.failure(weight, forms, *rest)
    )


def test_nan_is_noticed():
    weight, forms, *rest = layer(torch.bfloat16)
    forms.values[0, 0] = float("nan")
    assert "relative error nan" in str(self_check.failure(weight, forms, *rest))


def test_a_kernel_that_raises_is_noticed_and_tried_only_once(monkeypatch):
    weight, forms, scale, _, dtype = layer(torch.bfloat16)
    tried = []

    def fail(x, *_):
        tried.append(len(x))
        raise RuntimeError("no such kernel in this driver")

    monkeypatch.setattr(self_check, "sparse_linear", fail)
    for _ in range(2):
        reason = self_check.failure(weight, forms, scale, 64, dtype)
        assert reason == "RuntimeError at 1 tokens: no such kernel in this driver"
    assert tried == [1]


def test_every_tile_of_the_decode_kernel_and_one_token_more_are_tried(monkeypatch):
    weight, forms, scale, _, dtype = layer(torch.bfloat16)
    tried = []

    def right(x, *_):
        tried.append(len(x))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(self_check, "sparse_linear", right)
    assert self_check.failure(weight, forms, scale, 64, dtype) is None
    assert tried[::2] == tried[1::2] == [1, 16, 32, 64, 65]
    tried.clear()
    both = forms._replace(compressed=weight)
    assert self_check.failure(weight, both, scale, 64, dtype) is None
    assert tried[::2] == tried[1::2] == [1, 16, 32, 64, 65, 512, 2048]
