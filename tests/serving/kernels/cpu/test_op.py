"""The CPU kernels multiply like float64, whatever the shape, mask and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmc_attnmask.serving.kernels.cpu import library, machine, weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear

KINDS = [(dtype, kind) for dtype in weights.DTYPES for kind in ("2:4", "any")]
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.skipif(
    any(machine.lacks(machine.flags(), dtype, kind == "2:4") for dtype, kind in KINDS),
    reason="this machine cannot run the kernels",
)


def made_up(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, density: float, seed: int = 0
) -> Tensor:
    """Return a random weight; some rows have no entries."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if kind == "2:4":
        groups = noise.view(-1, 4)
        kept = groups.abs() >= groups.abs().sort().values[:, 2:3]
        kept = kept.view(shape) & (torch.rand(shape, generator=generator) < 0.9)
    else:
        kept = torch.rand(shape, generator=generator) < density
    noise[:: max(2, shape[0] // 3)] = 0
    if dtype == torch.int8:
        noise = (noise * 50).round().clamp(-128, 127)
    return torch.where(kept, noise, 0.0).to(dtype).contiguous()


def form_of(weight: Tensor, kind: str) -> weights.Weight:
    return (weights.two_of_four if kind == "2:4" else weights.any_mask)(weight)


def scales_of(weight: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scales of rows, row sums, scales of tokens and zero points."""
    return (
        torch.rand(len(weight)) + 0.01,
        weight.sum(1, dtype=torch.int32),
        torch.rand(tokens) + 0.01,
        torch.randint(-128, 128, (tokens,), dtype=torch.int32),
    )


def product(
    weight: Tensor, x: Tensor, kind: str, bias: Tensor | None, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a kernel's result, float64's, and the sum of absolute products."""
    rest: tuple = ()
    wide, inputs = weight.double(), x.double()
    if weight.dtype == torch.int8:
        channel, sums, token, zeros = scales_of(weight, len(x))
        rest = (channel, sums, token, zeros if asymmetric else None)
        wide *= channel[:, None].double()
        if asymmetric:
            inputs -= zeros[:, None].double()
        inputs *= token[:, None].double()
    found = cpu_sparse_linear(
        x, *form_of(weight, kind), **dict(zip(NAMES, rest, strict=False)), bias=bias
    )
    expected = inputs @ wide.T
    largest = inputs.abs() @ wide.abs().T
    if bias is not None:
        expected += bias.double()
        largest += bias.double().abs()
    return found, expected, largest


NAMES = ("channel_scales", "row_sums", "token_scales", "zero_points")


def tokens_of(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, (count, columns), dtype=torch.int8)
    return torch.randn(count, columns).bfloat16()


def assert_close(found: Tensor, expected: Tensor, largest: Tensor) -> None:
    """Allow for rounding the result to bf16, and for float32 sums in between."""
    error = (found.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 2**-20 * largest + 1e-30).all()


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 130),
    quads=st.integers(1, 90),
    odd=st.integers(0, 3),
    tokens=st.integers(1, 600),
    density=st.floats(0, 1),
    with_bias=st.booleans(),
    asymmetric=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_products_equal_those_of_float64(
    kind: tuple[torch.dtype, str],
    rows: int,
    quads: int,
    odd: int,
    tokens: int,
    density: float,
    with_bias: bool,
    asymmetric: bool,
    seed: int,
) -> None:
    dtype, structure = kind
    columns = 4 * quads + (odd if structure == "any" else 0)
    torch.manual_seed(seed)
    weight = made_up((rows, columns), dtype, structure, density, seed)
    bias = torch.randn(rows).bfloat16() if with_bias else None
    x = tokens_of(tokens, columns, dtype)
    assert_close(*product(weight, x, structure, bias, asymmetric))


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("tokens", [*range(1, 26), 512, 513, 1100])
def test_every_number_of_tokens_is_right(
    dtype: torch.dtype, kind: str, tokens: int
) -> None:
    weight = made_up((80, 1096), dtype, kind, 0.4)
    x = tokens_of(tokens, 1096, dtype)
    assert_close(*product(weight, x, kind, None, True))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_kernels_run_on_torchs_threads(count: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        assert library.threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, kind: str
) -> None:
    weight = made_up((500, 640), dtype, kind, 0.5)
    form = form_of(weight, kind)
    before = torch.get_num_threads()
    try:
        for tokens in (1, 5, 40):
            x = tokens_of(tokens, 640, dtype)
            rest = ()
            if dtype == torch.int8:
                torch.manual_seed(0)
                rest = scales_of(weight, tokens)
            outs = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                outs.append(cpu_sparse_linear(x, *form, *rest))
            assert all(torch.equal(outs[0], out) for out in outs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["2:4", "any"])
@pytest.mark.parametrize("special", [INF, -INF, NAN])
@pytest.mark.parametrize("tokens", [1, 40])
def test_inf_and_nan_of_a_kept_entry_reach_the_result(
    kind: str, special: float, tokens: int
) -> None:
    weight = torch.zeros(40, 64).bfloat16()
    weight[:, 8] = 1
    weight[3, 9] = special
    x = torch.ones(tokens, 64).bfloat16()
    found = cpu_sparse_linear(x, *form_of(weight, kind))
    expected = x.float() @ weight.float().T
    assert torch.equal(found.float().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("tokens", [1, 40])
def test_an_infinite_activation_meets_pruned_entries_only_where_weights_are_expanded(
    tokens: int,
) -> None:
    weight = torch.zeros(40, 64).bfloat16()
    weight[:, 8:10] = 1
    x = torch.ones(tokens, 64).bfloat16()
    x[:, 11] = INF  # pruned in every row, in a group that keeps two others
    sparse = cpu_sparse_linear(x, *weights.two_of_four(weight))
    assert (sparse == 2).all()
    assert cpu_sparse_linear(x, *weights.any_mask(weight)).isnan().all()  # as if dense


@pytest.mark.parametrize("kind", ["2:4", "any"])
def test_negative_zeros_are_kept_entries(kind: str) -> None:
    weight = torch.zeros(16, 8).bfloat16()
    weight[0, 0] = -0.0
    x = torch.full((1, 8), INF).bfloat16()
    assert cpu_sparse_linear(x, *form_of(weight, kind))[0, 0].isnan()


@pytest.mark.parametrize("kind", ["2:4", "any"])
def test_denormals_count_as_zero_like_in_bf16_dot_products(kind: str) -> None:
    weight = torch.zeros(16, 8).bfloat16()
    weight[:, 0] = 1e-39
    x = torch.full((1, 8), 2.0**100).bfloat16()
    assert (cpu_sparse_linear(x, *form_of(weight, kind)) == 0).all()


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_a_weight_without_entries_gives_the_bias(dtype: torch.dtype, kind: str) -> None:
    weight = torch.zeros(20, 40, dtype=dtype)
    bias = torch.randn(20).bfloat16()
    for tokens in (1, 40):
        x = tokens_of(tokens, 40, dtype)
        rest = scales_of(weight, tokens) if dtype == torch.int8 else (None,) * 4
        found = cpu_sparse_linear(x, *form_of(weight, kind), *rest, bias)
        assert torch.equal(found, bias.expand(tokens, -1))


def test_the_largest_int8_sums_do_not_overflow() -> None:
    columns = weights.LARGEST_COLUMNS
    weight = torch.full((16, columns), -128, dtype=torch.int8)
    x = torch.full((1, columns), -128, dtype=torch.int8)
    channel, token = torch.ones(16), torch.ones(1)
    sums = weight.sum(1, dtype=torch.int32)
    for zero in (0, 127):
        zeros = torch.tensor([zero], dtype=torch.int32)
        form = weights.any_mask(weight)
        found = cpu_sparse_linear(x, *form, channel, sums, token, zeros)
        assert_close(found, torch.full((1, 16), columns * 128.0 * (128 + zero)), found)


@pytest.mark.parametrize("kind", ["2:4", "any"])
def test_zero_points_far_from_the_range_are_exact(kind: str) -> None:
    weight = torch.zeros(16, 4096, dtype=torch.int8)
    weight.view(-1, 4)[:, :2] = 127  # of activations in [100, 101], for example
    x = torch.full((1, 4096), 100, dtype=torch.int8)
    zeros = torch.tensor([-25628], dtype=torch.int32)
    sums = weight.sum(1, dtype=torch.int32)
    ones = torch.ones(16), sums, torch.full((1,), 1e-6), zeros
    found = cpu_sparse_linear(x, *form_of(weight, kind), *ones)
    expected = torch.full((1, 16), 2048 * 127 * (100 + 25628) * 1e-6)
    assert_close(found, expected.double(), expected)


def test_tensors_of_other_sizes_are_refused() -> None:
    form = weights.any_mask(torch.zeros(20, 40).bfloat16())
    x = torch.zeros(2, 40).bfloat16()
    for narrow, bias in ((x[:, :39], None), (x, x[0])):
        with pytest.raises(ValueError, match=r"for a weight of 20 x 40"):
            cpu_sparse_linear(narrow, *form, bias=bias)


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
def test_no_tokens_give_no_results(dtype: torch.dtype, kind: str) -> None:
    form = form_of(torch.zeros(20, 40, dtype=dtype), kind)
    assert cpu_sparse_linear(torch.empty(0, 40, dtype=dtype), *form).shape == (0, 20)


def test_the_operator_passes_torchs_own_checks() -> None:
    weight = made_up((32, 64), torch.bfloat16, "any", 0.5)
    arguments = (torch.randn(3, 64).bfloat16(), *weights.any_mask(weight), *[None] * 5)
    torch.library.opcheck(torch.ops.llmc_attnmask.cpu_sparse_linear.default, arguments)
