"""The GPU kernels against the plain version, on CPU through Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from llmc_attnmask.attention import fused, matrix
from llmc_attnmask.attention.fused import error_and_gradient
from llmc_attnmask.attention.matrix import attention_error
from tests.attention.test_matrix import CALLS, DH, D, H, random_call
from tests.interpreter import interpreted

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
    for found, wanted in zip(gradients, exact, strict=True):
        assert wanted.grad.norm() > 0
        assert (found - wanted.grad).norm() <= rtol * wanted.grad.norm()


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
def test_lengths_that_are_no_multiple_of_a_tile(length, keys_mask):
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


def test_a_small_change_does_not_drown_in_rounding():
    """Where sums of squares would cancel: the error is a millionth of ||A||^2."""
    call = CALLS["causal"]
    compare(call, nudged(call, 1e-3), (1.0, 0.0), rtol=1e-2)


def test_a_query_that_sees_no_key_counts_as_in_the_plain_version():
    mask = torch.zeros_like(CALLS["causal"].mask)
    mask[..., :3, :] = torch.finfo(torch.float32).min
    call = random_call(mask=mask)
    compare(call, nudged(call, 0.3), (0.3, 0.7), rtol=1e-5)


def test_without_gradient_only_the_error_is_computed():
    call = random_call()
    single = replace(
        call, **{n: getattr(call, n).float() for n in ("query", "key", "value", "mask")}
    )
    error, gradients = error_and_gradient(
        single, single.query * 1.1, single.key, 1.0, 0.0, torch.ones(D, H * DH), False
    )
    assert error > 0
    assert gradients is None


def test_a_gpu_whose_shared_memory_is_too_small_gets_the_plain_version(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def too_large(*_):
        raise OutOfResources(114_688, 101_376, "shared memory")

    call = CALLS["causal"]
    query, key = (x.requires_grad_() for x in nudged(call, 0.3))
    expected = torch.autograd.grad(attention_error(call, query, key), (query, key))
    monkeypatch.setattr(matrix, "_fusible", lambda _: True)
    monkeypatch.setattr(fused, "error_and_gradient", too_large)
    found = torch.autograd.grad(attention_error(call, query, key), (query, key))
    assert all(map(torch.equal, found, expected))


_COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmc_attnmask.attention import fused, fused_kernels

capability, width = int(sys.argv[1]), int(sys.argv[2])
tile = fused.tile_size(width)
sizes = dict(dh=width, dv=width, WIDTH=width, VALUE_WIDTH=width, ROWS=tile,
             COLUMNS=tile, MASKED=True, CAPPED=True)
integers = ("heads", "groups", "length", "keys")
floats = ("scaling", "softcap", "matrix_weight")
found = {}
for name in ("statistics", "change", "query_gradient", "key_gradient"):
    kernel = getattr(fused_kernels, name)
    flag = "HAS_SINKS" if name == "statistics" else "OUTPUT"
    constants = {**sizes, flag: True}
    signature = {
        argument: "constexpr" if argument in constants
        else "fp32" if argument in floats
        else "i32" if argument in integers or argument.startswith("mask_")
        else "*i32" if argument == "ranges" else "*fp32"
        for argument in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options=fused._LAUNCH,
    )
    found[name] = compiled.metadata.shared
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, limit, width", [(80, 166_912, 128), (90, 232_448, 256)]
)
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(capability, limit, width):
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(capability), str(width)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    shared = json.loads(done.stdout.splitlines()[-1])
    assert len(shared) == 4
    assert max(shared.values()) <= limit
