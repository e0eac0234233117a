"""The kernel against float64 on the CPU, in Triton's interpreter; and its compilation
for GPUs, on which it cannot run here."""

import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from llmc_attnmask.serving.kernels import packing
from tests.support.interpreter import interpreted
from tests.support.kernels import dense
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values

triton_decode = pytest.importorskip("llmc_attnmask.serving.kernels.triton_decode")
pytestmark = interpreted

MIXED = [(torch.bfloat16, torch.int8), (torch.float16, torch.float8_e4m3fn)]
# of x, of the weight
PAIRS = [(dtype, dtype) for dtype in DTYPES] + MIXED


def _check(tokens, rows, columns, x_dtype, w_dtype, bias, out_dtype, seed):
    torch.manual_seed(seed)
    values, indices = packing.pack(random_2of4(rows, columns, w_dtype))
    x = random_values((tokens, columns), x_dtype)
    channel = torch.rand(rows) + 0.5 if w_dtype.itemsize == 1 else None
    token = torch.rand(tokens) + 0.5 if x_dtype.itemsize == 1 else None
    bias = torch.randn(rows) if bias else None
    arguments = (x, values, indices, channel, token, bias)
    expected = dense.linear(*arguments, torch.float64)
    found = triton_decode.linear(*arguments, out_dtype)
    assert found.dtype == out_dtype
    # fp32 sums of K products, then rounded to the output's precision
    error = torch.finfo(out_dtype).eps + 1e-6
    assert (found - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize(("x_dtype", "w_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_every_dtype_is_exact_up_to_rounding_of_its_sums(tokens, x_dtype, w_dtype):
    _check(tokens, 70, 264, x_dtype, w_dtype, True, torch.float32, seed=tokens)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 140),
    eighths=st.integers(1, 70),
    pair=st.sampled_from(PAIRS),
    bias=st.booleans(),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_every_shape_is_supported(tokens, rows, eighths, pair, bias, out_dtype, seed):
    if pair == (torch.int8, torch.int8):
        out_dtype = torch.float32  # unscaled sums exceed the range of fp16
    _check(tokens, rows, 8 * eighths, *pair, bias, out_dtype, seed)


def test_reused_memory_does_not_affect_the_result(monkeypatch):
    # every allocation starts as NaN or a large integer instead of arbitrary memory
    def poisoned(*shape, dtype, device):
        value = float("nan") if dtype.is_floating_point else 2**30
        return torch.full(shape, value, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    for dtype in (torch.bfloat16, torch.int8):
        _check(5, 70, 1032, dtype, dtype, False, torch.float32, seed=0)


def test_k_is_split_where_rows_alone_do_not_fill_a_gpu():
    small = triton_decode.plan(1, 4096, 4096)
    assert small.split > 1
    large = triton_decode.plan(1, 28672, 4096)
    assert large.split == 1 and large.chunks == 16


@pytest.mark.parametrize("tokens", [1, 17, 64, 200])
@pytest.mark.parametrize(("rows", "columns"), [(64, 8), (64, 2048), (4096, 14336)])
def test_a_plan_covers_all_of_k(tokens, rows, columns):
    plan = triton_decode.plan(tokens, rows, columns)
    chunks = -(-columns // packing.CHUNK)
    assert (plan.split - 1) * plan.chunks < chunks <= plan.split * plan.chunks


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(capability):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.kernels.compile_for_gpu",
            str(capability),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
