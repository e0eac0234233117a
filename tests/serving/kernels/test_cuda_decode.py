"""The kernel itself on the CPU, thread by thread, against float64; and its machine code
for the GPUs that it targets.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from llmc_attnmask.serving.kernels import (
    cuda_decode,
    forms,
    fragments,
    nvrtc,
    packing,
    select,
    self_check,
)
from tests.support.compiler import shared_library
from tests.support.kernels.emulator import KERNEL, SOURCES, Emulator, flags
from tests.support.kernels.matrices import DTYPES, random_2of4, random_values


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulator"))


def check(run, tokens, rows, columns, dtype, out_dtype=torch.float32, **how):
    torch.manual_seed(how.get("seed", 0))
    weight, x = (
        random_2of4(rows, columns, dtype),
        random_values((tokens, columns), dtype),
    )
    scaled = dtype.itemsize == 1
    channel = torch.rand(rows) + 0.5 if scaled else None
    token = torch.rand(tokens) + 0.5 if scaled else None
    bias = torch.randn(rows, dtype=out_dtype) if how.pop("bias", True) else None
    arrived = cuda_decode.counters(rows, torch.device("cpu"))
    packed = cuda_decode.pack(weight)
    found = run(x, *packed, arrived, channel, token, bias, out_dtype, **how)
    expected = x.double() @ weight.double().t()
    if channel is not None and token is not None:
        expected *= channel.double() * token.double()[:, None]
    if bias is not None:
        expected += bias.double()
    error = torch.finfo(out_dtype).eps + 1e-6  # fp32 sums, then rounded once
    assert (found - expected).abs().max() <= error * expected.abs().max()
    assert not arrived.any()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [
        (1, 64, 256),  # one tile of eight tokens, and of rows
        (3, 70, 544),  # neither rows nor columns fill their blocks
        (16, 130, 1024),
        (9, 64, 2048),  # K shared by several blocks
        (33, 64, 544),
        (100, 70, 256),  # more than one block of tokens
    ],
)
def test_the_product_is_exact_up_to_rounding_of_its_sums(
    emulator, dtype, tokens, rows, columns
):
    check(emulator.linear, tokens, rows, columns, dtype, seed=tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", fragments.SPANS)
def test_metadata_may_be_stored_in_longer_spans(emulator, dtype, span):
    torch.manual_seed(0)
    weight, x = random_2of4(70, 1056, dtype), random_values((9, 1056), dtype)
    values, nibbles = packing.kept(weight)
    metadata = fragments.metadata(nibbles, dtype.itemsize, span)
    arrived = cuda_decode.counters(70, x.device)
    rest = (arrived, None, None, None, torch.float32)
    found = emulator.linear(x, values, metadata, *rest, span)
    expected = x.double() @ weight.double().t()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_blocks_of_other_sizes_give_the_same_result(tmp_path):
    block = cuda_decode.Block(rows=128, stages=3)
    run = Emulator(tmp_path, block=block).linear
    for dtype in DTYPES:
        check(run, 9, 200, 1024, dtype, multiprocessors=40)
        check(run, 60, 130, 544, dtype)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    tokens=st.integers(1, 66),
    rows=st.integers(1, 140),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    bias=st.booleans(),
    multiprocessors=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_the_product_is_right_for_every_shape_and_order_of_threads(
    emulator, tokens, rows, columns, dtype, out_dtype, bias, multiprocessors, seed
):
    if dtype == torch.int8:
        out_dtype = torch.float32  # such sums exceed the range of fp16
    columns *= cuda_decode.MULTIPLE[dtype.itemsize]
    how = {"bias": bias, "multiprocessors": multiprocessors, "seed": seed}
    check(emulator.linear, tokens, rows, columns, dtype, out_dtype, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_results_do_not_depend_on_the_order_of_blocks(emulator, dtype):
    torch.manual_seed(0)
    packed = cuda_decode.pack(random_2of4(64, 2048, dtype))
    x = random_values((5, 2048), dtype)
    arrived = cuda_decode.counters(64, torch.device("cpu"))
    first, *others = (
        emulator.linear(
            *(x, *packed, arrived, None, None, None, torch.float32),
            multiprocessors=100,
            seed=seed,
        )
        for seed in range(5)
    )
    assert cuda_decode.plan(5, 64, 2048, dtype, 100).split > 1
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("what", "instead"),
    [
        ("await_copies<STAGES - 2>()", "await_copies<STAGES - 1>()"),
        ("lane % 16,", "lane % 8,"),
        ("own(i) += there(i);", "own(i);"),
        ("sparse_mma<KIND, S::ITEM == 1 ? 0 : 1>", "sparse_mma<KIND, 0>"),
        ("    __syncthreads();                         // and the slot", "    // "),
    ],
)
def test_the_emulator_notices_mistakes(tmp_path, what, instead):
    """Each of these would run silently on a GPU, with wrong results."""
    found = 0
    for source in KERNEL.iterdir():
        text = source.read_text("utf-8")
        found += text.count(what)
        (tmp_path / source.name).write_text(text.replace(what, instead), "utf-8")
    assert found == 1
    (tmp_path / "primitives.cuh").unlink()
    run = Emulator(tmp_path, "-DONE_KERNEL", kernel=tmp_path).linear
    with pytest.raises(AssertionError):
        for seed in range(4):
            check(run, 9, 64, 1024, torch.bfloat16, seed=seed)


def test_missing_tokens_are_not_read(emulator):
    """As in a CUDA graph, whose padding has arbitrary memory contents."""
    torch.manual_seed(0)
    packed = cuda_decode.pack(random_2of4(64, 256, torch.bfloat16))
    memory = torch.full((9, 256), float("nan"), dtype=torch.bfloat16)
    memory[:3] = 1.0
    arrived = cuda_decode.counters(64, torch.device("cpu"))
    rest = (*packed, arrived, None, None, None, torch.float32)
    assert emulator.linear(memory[:3], *rest).isfinite().all()
    padded = emulator.linear(memory, *rest)
    assert torch.equal(padded[:3], emulator.linear(memory[:3], *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_in_bytes_is_as_documented(dtype):
    weight = random_2of4(128, 512, dtype)
    packed = sum(part.nbytes for part in cuda_decode.pack(weight))
    assert packed * 16 == weight.nbytes * (9 if dtype.itemsize == 2 else 10)


def test_unsupported_weights_are_refused():
    with pytest.raises(ValueError, match="24 inputs, not a multiple of 16"):
        cuda_decode.pack(torch.zeros(8, 24, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="48 inputs, not a multiple of 32"):
        cuda_decode.pack(torch.zeros(8, 48, dtype=torch.int8))
    with pytest.raises(ValueError, match="no kernel for float32"):
        cuda_decode.pack(torch.zeros(8, 32))
    with pytest.raises(ValueError, match="not 2:4"):
        cuda_decode.pack(torch.ones(8, 32, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (4096, 14336), (28672, 4096)])
def test_a_plan_covers_tokens_rows_and_columns(dtype, tokens, rows, columns):
    how = cuda_decode.plan(tokens, rows, columns, dtype)
    stages = -(-columns // fragments.STAGE[dtype.itemsize])
    assert how.grid == (-(-rows // 64), how.split, -(-tokens // (8 * how.tile)))
    assert (how.split - 1) * how.stages < stages <= how.split * how.stages
    assert how.shared_memory <= 163 * 1024  # of an A100


def test_k_is_split_where_rows_alone_do_not_fill_a_gpu():
    assert cuda_decode.plan(1, 28672, 4096, torch.bfloat16).split == 1
    assert cuda_decode.plan(1, 4096, 14336, torch.bfloat16).split > 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_is_served_and_checked_with_this_kernel(emulator, monkeypatch, dtype):
    monkeypatch.setattr(cuda_decode, "linear", emulator.linear)
    monkeypatch.setattr(self_check, "_known", {})
    torch.manual_seed(0)
    weight = random_2of4(70, 288, dtype)
    choice = select.Choice("cuda", "cuda", select.NO_LIMIT, "")
    made = forms.make(weight, choice, largest=8192)
    assert made.compressed is None
    scaled = dtype.itemsize == 1
    scale = torch.rand(70) + 0.1 if scaled else None
    rest = (scale, choice.tokens, torch.bfloat16 if scaled else dtype)
    assert self_check.failure(weight, made, *rest) is None
    self_check._known.clear()
    wrong = made._replace(indices=made.indices.flip(0))
    reason = str(self_check.failure(weight, wrong, *rest))
    assert "relative error" in reason and "at 1 tokens" in reason


GPUS = [
    (architecture, dtype)
    for architecture in ("sm_80", "sm_89", "sm_90a")
    for dtype in DTYPES
    if dtype != torch.float8_e4m3fn or architecture != "sm_80"
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dtype"), GPUS, ids=str)
def test_the_kernel_compiles_to_sparse_products_without_spills(
    architecture, dtype, tmp_path
):
    pytest.importorskip("cuda.bindings.nvrtc")
    nvidia = pytest.importorskip("triton.backends.nvidia")
    tools = Path(nvidia.__path__[0]) / "bin"
    binary, symbols = cuda_decode.compile_kernels(dtype, architecture)
    assert len(set(symbols.values())) == len(cuda_decode.TILES)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary)

    def dump(*options: str) -> str:
        command = [tools / "cuobjdump", *options, cubin]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    used = re.findall(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    assert len(used) == len(cuda_decode.TILES)
    assert {stack for _, stack in used} == {"0"}
    code = dump("-sass")
    product = "IMMA.SP.16864" if dtype == torch.int8 else "HMMA.SP.16832"
    # of each half of K: two steps, two products of 16 rows, twice for expanded fp8
    each = 2 * 2 * (2 if dtype == torch.float8_e4m3fn else 1)
    assert code.count(product) >= each * sum(cuda_decode.TILES)
    assert not re.search(r"\b(LDL|STL)\b", code)  # local memory
    assert code.count("LDGSTS.E.BYPASS.128") >= 4 * len(cuda_decode.TILES)


_LAUNCH = """
import torch
from llmc_attnmask.serving.kernels import cuda_decode, nvrtc
from tests.support.kernels.matrices import random_2of4

torch.manual_seed(0)
dtype = torch.bfloat16
module = nvrtc.Module(*cuda_decode.compile_kernels(dtype, "sm_90"))
weight, x = random_2of4(70, 512, dtype), torch.randn(12, 512).to(dtype)
arrived = cuda_decode.counters(70, x.device)


def launch(how, dtype, given, _):
    name = cuda_decode.kernel_name(dtype, how.tile)
    launch = (name, how.grid, how.block.threads, how.shared_memory, 77, given)
    try:
        module.launch(*launch)
    except RuntimeError as error:
        print(error)
    module.allow_shared_memory(name, how.shared_memory)
    module.launch(*launch)


cuda_decode._launch = launch
cuda_decode._multiprocessors = lambda _: 132
packed = cuda_decode.pack(weight)
out = cuda_decode.linear(x, *packed, arrived, None, None, None, torch.float32)
expected = x.float() @ weight.float().t()
print(float((out - expected).abs().max() / expected.abs().max()) < 1e-6)
"""


def test_a_launch_reaches_the_driver_correctly(tmp_path):
    """The real NVRTC and cuda-bindings, and a driver whose GPU is the emulator."""
    pytest.importorskip("cuda.bindings.nvrtc")
    source = SOURCES / "driver.cc"
    driver = shared_library(source, tmp_path, *flags(), "-DONE_KERNEL")
    driver.rename(tmp_path / "libcuda.so.1")
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # more shared memory than is allowed without a request
    refusal = "CUDA returned CUDA_ERROR_INVALID_VALUE (1)"
    assert done.stdout.splitlines() == [refusal, "True"]


def test_a_compilation_error_quotes_the_compiler():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(
        nvrtc.CompilationError, match=r"a\.cu does not compile for sm_90"
    ):
        nvrtc.compile_cubin("nonsense;", "a.cu", {}, [], "sm_90")
