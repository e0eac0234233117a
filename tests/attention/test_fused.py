"""The GPU kernels against the plain version, on CPU through Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from llmc_attnmask.attention import matrix
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.fused import error_and_gradient
from llmc_attnmask.attention.fused_choice import fused_by_default, fusible
from llmc_attnmask.attention.matrix import attention_error
from tests.attention.test_matrix import BLIND, CALLS, DH, D, H, random_call
from tests.support.interpreter import interpreted

pytestmark = interpreted


def compare(call, pruned, weights, rtol):
    torch.manual_seed(1)
    width = call.value.shape[-1] * call.query.shape[1]
    projection = torch.randn(D, width, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in pruned]
    expected = attention_error(
        call,
        *exact,
        matrix_weight=weights[0],
        output_weight=weights[1],
        output_projection=projection,
    )
    expected.backward()
    single = replace(
        call,
        **{
            name: getattr(call, name).float()
            for name in ("query", "key", "value", "mask", "sinks")
            if getattr(call, name) is not None
        },
    )
    error, gradients = error_and_gradient(
        single, *(x.float() for x in pruned), *weights, projection
    )
    assert error.item() == pytest.approx(expected.item(), rel=rtol)
    for found, correct in zip(gradients, exact, strict=True):
        assert correct.grad.norm() > 0
        assert (found - correct.grad).norm() <= rtol * correct.grad.norm()


def nudged(call, size):
    torch.manual_seed(0)
    return [x + size * torch.randn_like(x) for x in (call.query, call.key)]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.7)])
def test_error_and_gradient_equal_the_plain_version(call, weights):
    compare(call, nudged(call, 0.3), weights, rtol=1e-5)


@pytest.mark.parametrize(
    "length, keys_mask", [(70, "causal"), (70, "window"), (33, "")]
)
def test_lengths_need_not_be_a_multiple_of_a_tile(length, keys_mask):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    visible = torch.ones(length, length, dtype=torch.bool)
    if keys_mask:
        visible = visible.tril()
    if keys_mask == "window":
        visible &= ~visible.tril(-40)
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64)
    mask.masked_fill_(~visible, torch.finfo(torch.float32).min)
    call = random_call(
        query=normal(1, H, length, 20) * 2,
        key=normal(1, 2, length, 20),
        value=normal(1, 2, length, 12),
        mask=mask,
    )
    compare(call, nudged(call, 0.2), (0.3, 0.7), rtol=1e-5)


def test_a_small_change_is_not_lost_in_rounding():
    """Sums of squares would cancel: the error is a millionth of ||A||^2."""
    call = CALLS["causal"]
    compare(call, nudged(call, 1e-3), (1.0, 0.0), rtol=1e-2)


def test_a_query_that_sees_no_key_counts_as_in_the_plain_version():
    mask = torch.zeros_like(CALLS["causal"].mask)
    mask[..., :3, :] = torch.finfo(torch.float32).min
    call = random_call(mask=mask)
    compare(call, nudged(call, 0.3), (0.3, 0.7), rtol=1e-5)


@pytest.mark.parametrize("mask", BLIND.values(), ids=BLIND.keys())
def test_an_all_infinite_row_is_zero_as_in_the_plain_version(mask):
    compare(random_call(mask=mask), nudged(CALLS["causal"], 0.3), (0.3, 0.7), 1e-5)


def test_a_tile_of_rows_that_see_no_key_adds_nothing():
    length, blind = 3 * 64, slice(64, 128)
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(1, 1, length, 8, generator=generator) for _ in range(3)]
    mask = torch.zeros(1, 1, length, length)
    mask.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mask[:, :, blind] = -torch.inf
    call = AttentionCall(*tensors, mask, 0.25)
    arguments = 0.3, 0.7, torch.randn(D, 8, generator=generator)
    query, key = nudged(call, 0.3)
    error, (to_query, to_key) = error_and_gradient(call, query, key, *arguments)
    seen = torch.ones(length, dtype=torch.bool)
    seen[blind] = False
    rest = replace(call, query=call.query[:, :, seen], mask=mask[:, :, seen])
    expected, (from_query, from_key) = error_and_gradient(
        rest, query[:, :, seen], key, *arguments
    )
    assert error.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not to_query[:, :, blind].any()
    torch.testing.assert_close(to_query[:, :, seen], from_query)
    torch.testing.assert_close(to_key, from_key)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_an_all_infinite_pruned_row_is_zero_as_in_the_plain_version():
    """Logits below float32's range: A~ is zero in that row, and A counts in full."""
    call = random_call(mask=None)
    single = replace(
        call, **{n: getattr(call, n).float() for n in ("query", "key", "value")}
    )
    query, key = (x.float() for x in nudged(call, 0.3))
    query[..., 0], key[..., 0] = 0, -(2.0**70)
    query[:, :, 3, 0] = 2.0**70
    plain = [x.clone().requires_grad_() for x in (query, key)]
    expected = attention_error(single, *plain)
    expected.backward()
    error, gradients = error_and_gradient(single, query, key, 1.0, 0.0, None)
    assert error.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, exact in zip(gradients, plain, strict=True):
        assert exact.grad.isfinite().all()
        assert found.isfinite().all()
    assert not gradients[0][:, :, 3].any()


def test_without_a_gradient_only_the_error_is_computed():
    call = random_call()
    single = replace(
        call, **{n: getattr(call, n).float() for n in ("query", "key", "value", "mask")}
    )
    error, gradients = error_and_gradient(
        single, single.query * 1.1, single.key, 1.0, 0.0, torch.ones(D, H * DH), False
    )
    assert error > 0
    assert gradients is None


@pytest.mark.parametrize(
    "capability, dtype, widths, chosen",
    [
        ((8, 0), torch.float32, (128, 128), True),
        ((9, 0), torch.float32, (64, 64), True),
        ((9, 0), torch.float32, (256, 256), False),
        ((9, 0), torch.float32, (192, 128), False),
        ((9, 0), torch.float64, (64, 64), False),
        ((7, 5), torch.float32, (64, 64), False),
        ((10, 0), torch.float32, (64, 64), False),
    ],
)
def test_the_kernels_are_the_default_where_their_compilation_is_checked(
    capability, dtype, widths, chosen
):
    assert fused_by_default(capability, dtype, widths) is chosen


def test_without_a_gpu_the_plain_version_runs():
    assert not fusible(CALLS["causal"])


def test_the_kernels_run_where_they_are_chosen(monkeypatch):
    call = CALLS["causal"]
    exact = [x.requires_grad_() for x in nudged(call, 0.3)]
    expected = torch.autograd.grad(attention_error(call, *exact), exact)
    single = replace(
        call, **{n: getattr(call, n).float() for n in ("query", "key", "value", "mask")}
    )
    pruned = [x.detach().float().requires_grad_() for x in exact]
    monkeypatch.setattr(matrix, "_fusible", lambda _: True)
    found = torch.autograd.grad(attention_error(single, *pruned), pruned)
    for ours, correct in zip(found, expected, strict=True):
        assert 0 < (ours - correct).norm() <= 1e-5 * correct.norm()
