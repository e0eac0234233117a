"""What surrounds the library, which needs a GPU: here a dense product in its place."""

import pytest
import torch

from llmc_attnmask.serving.kernels import activations, cusparselt
from tests.serving.kernels.matrices import random_2of4

ROWS, COLUMNS = 32, 64


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The product as torch documents it, of a matrix that is not compressed."""

    def product(
        weight, tokens, bias=None, alpha=None, out_dtype=None, transpose_result=False
    ):
        assert transpose_result
        assert not tokens.is_contiguous()  # read as a transpose
        assert tokens.shape[1] % cusparselt.MULTIPLE[weight.itemsize][1] == 0
        out = weight.double() @ tokens.double()
        if alpha is not None:
            assert alpha.dtype == torch.float32
            assert alpha.shape == (ROWS,)
            out *= alpha[:, None]
        if bias is not None:
            out += bias[:, None]
        return out.t().contiguous().to(out_dtype or tokens.dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(tokens, dtype):
    torch.manual_seed(0)
    weight = random_2of4(ROWS, COLUMNS, dtype)
    x, bias = torch.randn(tokens, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    found = cusparselt.linear(x, weight, None, None, bias, dtype)
    assert found.dtype == dtype
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_tokens_side_by_side(dtype, out_dtype):
    torch.manual_seed(0)
    weight = random_2of4(ROWS, COLUMNS, dtype)
    scale = torch.rand(ROWS) * 0.01
    x = torch.randn(3, COLUMNS) * torch.tensor([[1e-3], [1.0], [100.0]])
    tokens, token_scale = activations.quantize(x, dtype)
    found = cusparselt.linear(tokens, weight, scale, token_scale, None, out_dtype)
    assert found.dtype == out_dtype
    expected = (tokens.double() @ weight.double().t()) * scale * token_scale[:, None]
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 3e38])
def test_a_padding_token_of_a_cuda_graph_spoils_no_other(dtype, rubbish):
    torch.manual_seed(0)
    weight, scale = random_2of4(ROWS, COLUMNS, dtype), torch.rand(ROWS)
    tokens, token_scale = activations.quantize(torch.randn(5, COLUMNS), dtype)
    arguments = (tokens, weight, scale)
    clean = cusparselt.linear(*arguments, token_scale, None, torch.bfloat16)
    token_scale[-1] = rubbish
    found = cusparselt.linear(*arguments, token_scale, None, torch.bfloat16)
    assert torch.equal(found[:-1], clean[:-1])
