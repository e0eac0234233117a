"""Products, against a stand-in library that computes on the CPU."""

import pytest
import torch

from llmc_attnmask.serving.kernels import activations, cusparselt
from llmc_attnmask.serving.kernels.cusparselt import buckets
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from tests.support.kernels.fake_cusparselt import Fake
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values

ROWS, COLUMNS, LARGEST = 32, 64, 48
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Fake:
    return Fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def engine(fake) -> Engine:
    torch.manual_seed(0)
    fake.reset()
    return Engine(fake.library())


def prepared(engine, dtype, **options):
    """A weight, and its compressed form after ``prepare``."""
    weight = random_2of4(ROWS, COLUMNS, dtype)
    compressed = engine.compress(weight)
    engine.prepare(compressed, COLUMNS, **{"largest": LARGEST, **options})
    return weight, compressed


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 47, 48, 49, 96, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_products_are_exact_up_to_rounding(engine, tokens, dtype):
    weight, compressed = prepared(engine, dtype)
    x, bias = random_values((tokens, COLUMNS), dtype), torch.randn(ROWS).to(dtype)
    found = engine.linear(x, compressed, None, None, bias, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-6)
    without = engine.linear(x, compressed, None, None, None, dtype)
    expected -= bias.double()
    torch.testing.assert_close(without.double(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_eight_bit_products_are_exact_with_large_and_small_tokens_side_by_side(
    engine, dtype, out_dtype, with_bias
):
    weight, compressed = prepared(engine, dtype)
    scale = torch.rand(ROWS) * 0.01
    x = torch.randn(3, COLUMNS) * torch.tensor([[1e-3], [1.0], [100.0]])
    tokens, token_scale = activations.reference(x, dtype)
    bias = torch.randn(ROWS).to(out_dtype) if with_bias else None
    found = engine.linear(tokens, compressed, scale, token_scale, bias, out_dtype)
    assert found.dtype == out_dtype and found.shape == (3, ROWS)
    expected = (tokens.double() @ weight.double().t()) * scale * token_scale[:, None]
    atol = 1e-6
    if bias is not None:
        atol = 2**-8 * float(expected.abs().max())  # where the sum cancels out
        expected += bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=atol)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
def test_a_padding_token_of_a_cuda_graph_affects_no_other(engine, dtype, garbage):
    _, compressed = prepared(engine, dtype)
    scale = torch.rand(ROWS)
    tokens, token_scale = activations.reference(torch.randn(5, COLUMNS), dtype)
    arguments = (tokens, compressed, scale)
    clean = engine.linear(*arguments, token_scale, None, torch.bfloat16)
    token_scale[-1] = garbage
    found = engine.linear(*arguments, token_scale, None, torch.bfloat16)
    assert torch.equal(found[:-1], clean[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_memory_after_the_last_token_affects_no_token(engine, dtype, monkeypatch):
    _, compressed = prepared(engine, dtype)
    scales = (torch.rand(ROWS), torch.rand(5)) if dtype.itemsize == 1 else (None, None)
    x = random_values((5, COLUMNS), dtype)
    arguments = (x, compressed, *scales, None, torch.bfloat16)
    clean = engine.linear(*arguments)
    empty = torch.Tensor.new_empty

    def of_nan(tensor, *size, **options):
        made = empty(tensor, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", of_nan)
    assert torch.equal(engine.linear(*arguments), clean)


def test_no_tokens_give_an_empty_result(engine):
    _, compressed = prepared(engine, torch.bfloat16)
    x = torch.empty(0, COLUMNS, dtype=torch.bfloat16)
    found = engine.linear(x, compressed, None, None, None, x.dtype)
    assert found.shape == (0, ROWS)


def test_tokens_at_an_address_that_the_library_refuses_are_still_multiplied(engine):
    weight, compressed = prepared(engine, torch.bfloat16)
    memory = random_values((1, 16 * COLUMNS + 1), torch.bfloat16)[0]
    x = memory[1:].view(16, COLUMNS)
    assert x.data_ptr() % 16
    found = engine.linear(x, compressed, None, None, None, x.dtype)
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kept_values_come_first(engine, dtype):
    weight = random_2of4(ROWS, COLUMNS, dtype)
    bits = weight.view({1: torch.int8, 2: torch.int16}[dtype.itemsize])
    groups = bits.view(ROWS, -1, 4)
    groups[..., 0], groups[..., 3], groups[..., 1:3] = 1, 2, 0
    compressed = engine.compress(weight)
    assert compressed.dtype == dtype and compressed.shape[0] == ROWS
    kept = cusparselt.kept_values(compressed, COLUMNS)
    assert torch.equal(kept.view(bits.dtype), groups[..., [0, 3]].reshape(ROWS, -1))


def test_another_dtype_is_refused(engine):
    with pytest.raises(
        ValueError, match=r"float32 weights are not supported; expected torch.float16"
    ):
        engine.compress(torch.zeros(ROWS, COLUMNS))


def test_scales_with_sixteen_bits_are_refused(engine):
    _, compressed = prepared(engine, torch.bfloat16)
    x = random_values((2, COLUMNS), torch.bfloat16)
    with pytest.raises(ValueError, match="none with 16"):
        engine.linear(x, compressed, torch.ones(ROWS), torch.ones(2), None, x.dtype)


@pytest.mark.parametrize("largest", [1, 16, 100, 300, 512, 2000, 8192])
@pytest.mark.parametrize("fewest", [1, 65])
def test_buckets_waste_little(largest, fewest):
    if fewest > largest:
        with pytest.raises(ValueError, match="expected 1 <= fewest <= largest"):
            buckets.buckets(fewest, largest)
        return
    found = buckets.buckets(fewest, largest)
    assert found == sorted(set(found)) and not any(n % 16 for n in found)
    assert largest <= found[-1] < largest + 16 and found[0] < fewest + 16
    for tokens in range(fewest, largest + 1):
        padding = buckets.fitting(found, tokens) - tokens
        assert 0 <= padding < 16 or padding < min(tokens / 4, 128)


def test_searched_buckets_represent_their_neighbors():
    found = buckets.buckets(1, 8192)
    searched = buckets.representatives(found)
    assert searched == [2048, 512, 128, 32]
    assert [buckets.nearest(searched, n) for n in (16, 64, 256, 1024, 8192)] == [
        *(32, 128, 512, 2048, 2048)
    ]
    assert buckets.representatives([16]) == [16]
