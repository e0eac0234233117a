"""Every line of the steps that only a GPU reaches, run with stand-ins for CUDA."""

import argparse
import sys

import pytest
import torch

from integration.gpu import context, kernels, record, step, tables, timing, weights
from integration.gpu.context import Context, GpuLostError
from integration.gpu.figures import Figures
from integration.gpu.steps import (
    attention,
    correct,
    cusparselt_checks,
    linears,
    machine,
    profile,
)
from integration.gpu.steps import prune as prune_step
from integration.gpu.timing import Timer
from tests.support.gpu import library, stand_in

NONE = argparse.Namespace()


@pytest.fixture
def gpu(monkeypatch):
    for name, shape in weights.SMALL.items():
        monkeypatch.setitem(weights.SHAPES, name, shape)
    monkeypatch.setattr(linears, "CALLS", 3)
    monkeypatch.setattr(weights, "ROTATED", 2**15)
    monkeypatch.setattr(timing, "REPLAYS", (1, 1))
    monkeypatch.setattr(machine, "PRODUCT", 64)
    monkeypatch.setattr(machine, "COPIED", 2**10)
    # Triton's interpreter is not an operation of torch that a graph would record
    without = kernels.Kernel(lambda *_: "left out", lambda _: (), lambda *_: None)
    monkeypatch.setitem(kernels.KERNELS, "triton", without)
    library.install(monkeypatch)
    with stand_in.cuda(monkeypatch):
        yield


def step_context(tmp_path, name: str, **options) -> Context:
    return Context(step=name, folder=tmp_path, gpu=stand_in.NAME, **options)


def rows_of(tmp_path) -> list[dict]:
    return record.read(tmp_path / record.FILE).rows


def failed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "failed" in row]


def test_a_graph_computes_with_the_tensors_contents_at_replay(gpu):
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.nn.functional.linear(x, weight) * 2
    x.fill_(1.0)
    out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(out, 2 * weight.sum(1).expand(2, 4))


@pytest.mark.parametrize("kernel", ["cuda", "cusparselt", "dense"])
def test_correct_kernels_pass_in_every_type_and_size(gpu, tmp_path, kernel):
    correct.check_kernel(step_context(tmp_path, "correct"), kernel)
    rows = rows_of(tmp_path)
    checked = [row for row in rows if "right" in row]
    assert not failed(rows) and all(row["right"] for row in checked)
    sizes = len(list(correct.cases(trial=False)))
    types = 3 if kernel == "dense" else 4  # torch has no int8
    assert len(checked) == types * sizes
    assert all(row["graph"] < 0.01 for row in checked)


def test_a_kernel_that_skips_a_row_or_reads_old_tokens_is_wrong(gpu, monkeypatch):
    packed = kernels.pack(
        "cusparselt", weights.random_weight(64, 128, torch.bfloat16, "cuda")
    )
    assert correct.errors(packed, 5, "cuda")["right"]
    real = kernels.cusparselt.linear

    def incomplete(*args):
        out = real(*args).clone()
        out[-1] = float("nan")
        return out

    monkeypatch.setattr(kernels.cusparselt, "linear", incomplete)
    found = correct.errors(packed, 5, "cuda")
    assert found["right"] is False
    at_first = []

    def stale(x, *rest):
        at_first.append(x.clone())
        return real(at_first[0], *rest)

    monkeypatch.setattr(kernels.cusparselt, "linear", stale)
    found = correct.errors(packed, 5, "cuda")
    assert found["eager"] < 0.01 and found["right"] is True  # the first tokens again
    at_first[:] = [torch.randn_like(at_first[0])]
    assert correct.errors(packed, 5, "cuda")["right"] is False


OPTIONS = argparse.Namespace(shapes=None, dtypes=None, tokens=None, kernels=None)


def test_decode_times_every_kernel_type_size_and_way_of_calling(gpu, tmp_path):
    run = step_context(tmp_path, "decode")
    linears.decode(run, OPTIONS)
    rows = rows_of(tmp_path)
    assert not failed(rows)
    timed = [row for row in rows if "us" in row]
    cases = {
        (r["shape"], r["dtype"], r["tokens"], r["kernel"], r["mode"]) for r in timed
    }
    assert len(cases) == len(timed) == 4 * 4 * 2 * (3 + 3 + 2)  # int8: no dense kernel
    packed = [row for row in rows if "share" in row]
    stored = [row for row in packed if row["kernel"] == "cusparselt"]
    assert {row["share"] for row in stored} == {0.5625, 0.625}
    assert timed[0]["gpu"] == stand_in.NAME and "trial" not in timed[0]


def test_other_block_sizes_of_the_decode_kernel_are_timed_and_tabulated(gpu, tmp_path):
    linears.blocks(step_context(tmp_path, "blocks"), OPTIONS)
    rows = rows_of(tmp_path)
    assert not failed(rows)
    timed = [r for r in rows if "us" in r and r["mode"] == "graph"]
    named = {row["kernel"] for row in timed}
    assert named == {"cuda", *kernels.BLOCKS}
    lines = tables.blocks(Figures(rows)).splitlines()
    assert len(lines) == 2 + len(timed) // len(named)
    assert all(name in lines[0] for name in named)


def test_prefill_times_searched_and_unsearched_algorithms(gpu, tmp_path):
    options = argparse.Namespace(
        **(vars(OPTIONS) | {"tokens": [70], "dtypes": ["fp8"]})
    )
    linears.prefill(step_context(tmp_path, "prefill"), options)
    rows = rows_of(tmp_path)
    assert not failed(rows)
    assert {row["kernel"] for row in rows if "us" in row} == {
        *("dense", "cusparselt", "cusparselt unsearched")
    }


def o_proj() -> tuple[int, int]:
    return weights.SHAPES["o_proj"]


def test_a_wrong_kernel_that_was_fixed_is_timed(tmp_path):
    checked = step_context(tmp_path, "correct")
    case = {"kernel": "cuda", "dtype": "bf16", "tokens": 1}
    case |= dict(zip(("rows", "columns"), o_proj(), strict=True))
    checked.record(**case, right=False)
    checked.record(kernel="triton", failed="ended with exit code 1")
    found = {("cuda", "bf16"), ("triton", None)}
    assert correct.wrong(checked.rows()) == found
    assert "**wrong** in 1" in tables.correctness(Figures(checked.rows()))
    checked.record(**case, right=True)
    checked.record(**(case | {"kernel": "triton"}), right=True)
    assert correct.wrong(checked.rows()) == set()
    assert "wrong" not in tables.correctness(Figures(checked.rows()))


def test_a_wrong_kernel_is_not_timed(gpu, tmp_path):
    checked = step_context(tmp_path, "correct")
    timed_size, odd = ({"rows": r, "columns": c} for r, c in (o_proj(), (96, 320)))
    checked.record(kernel="cuda", dtype="bf16", tokens=1, **timed_size, right=False)
    checked.record(kernel="cuda", dtype="int8", tokens=1, **odd, right=False)
    checked.record(kernel="cusparselt", failed="timed out")
    checked.record(kernel="dense", dtype="bf16", failed="what others are compared with")
    chosen = {"shapes": ["o_proj"], "tokens": [1], "dtypes": ["bf16", "int8"]}
    options = argparse.Namespace(**(vars(OPTIONS) | chosen))
    linears.decode(step_context(tmp_path, "decode"), options)
    timed = {(r["kernel"], r["dtype"]) for r in rows_of(tmp_path) if "us" in r}
    assert timed == {("dense", "bf16"), ("cuda", "int8")}


def test_cusparselt_is_checked_for_size_order_layout_and_a_first_call_in_a_graph(
    gpu, tmp_path
):
    cusparselt_checks.run(step_context(tmp_path, "cusparselt"), NONE)
    rows = rows_of(tmp_path)
    assert not failed(rows)
    stored = [row for row in rows if row.get("of") == "stored"]
    assert len(stored) == 8 and all(row["values_shared"] for row in stored)
    assert {row["share"] for row in stored} == {0.5625, 0.625}
    first = [row for row in rows if row.get("of") == "recorded first"]
    assert len(first) == 4 and all(row["right"] for row in first)
    layouts = [row for row in rows if row.get("of") == "layout"]
    assert len(layouts) == 4
    for row in layouts:  # row by row, as the stand-in stores them
        assert row["regular"] and row["groups"] == list(range(128 * 64))
        assert row["codes"]["01"] == 0 | 1 << 2 and row["codes"]["23"] == 2 | 3 << 2


def test_the_machine_is_described(gpu, tmp_path):
    machine.run(step_context(tmp_path, "machine"), NONE)
    rows = rows_of(tmp_path)
    assert not failed(rows)
    found = {key for row in rows for key in row}
    assert {"versions", "copy_tb_per_s", "product_tflop_per_s"} <= found
    versions = next(row["versions"] for row in rows if "versions" in row)
    assert versions["capability"] == "9.0" and len(versions["sources"]) == 12


def test_profiled_launches_follow_marks(gpu, tmp_path):
    profile.run(step_context(tmp_path, "profile"), argparse.Namespace(launch=True))
    cases = list(profile.cases(step_context(tmp_path, "profile")))
    assert len(cases) == len(profile.CASES) * 2


def test_the_attention_error_is_timed_with_its_memory(gpu, monkeypatch):
    found = attention.speed(64, "cuda")
    assert found["ms"] > 0 and found["peak_mb"] == 1.0


def test_a_pruned_layer_is_recorded_with_its_peak_memory(gpu, monkeypatch, tmp_path):
    # the recipe itself would need a GPU; its own test runs it on the CPU
    monkeypatch.setattr(prune_step, "compress", lambda *_: None)
    options = argparse.Namespace(
        layers=1, samples=2, length=16, width=128, recipe=prune_step.RECIPE
    )
    run = step_context(tmp_path, "prune")
    made = prune_step.random_llama(1, 16, 128, "cpu")
    monkeypatch.setattr(prune_step, "random_llama", lambda *_: made)
    prune_step.run(run, options)
    rows = rows_of(tmp_path)
    assert not failed(rows) and rows[-1]["peak_gb"] == 2**20 / 1e9


def test_a_timer_gives_the_time_of_one_call(gpu):
    calls = []
    assert 0 < Timer("cuda").graph([lambda: calls.append(1)] * 4) < 1e4
    assert len(calls) == 8  # once before, once while recording


def test_a_lost_gpu_ends_the_process_and_the_step_continues_in_a_new_one(
    gpu, monkeypatch, tmp_path
):
    run = step_context(tmp_path, "decode")

    def crash():
        raise RuntimeError("an illegal memory access was encountered")

    def gone(*_):
        raise RuntimeError("CUDA error: an illegal memory access")

    assert run.attempt({"case": 1}, crash) is None  # the GPU answers: continue
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(GpuLostError, match="illegal"):
        run.attempt({"case": 2}, crash)
    again = step_context(tmp_path, "decode")
    again.done = context.known(again.rows(), "decode")
    assert again.attempt({"case": 2}, lambda: {"us": 1.0}) is None
    assert again.attempt({"case": 3}, lambda: {"us": 1.0}) == {"us": 1.0}
    assert [row["case"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_step_that_loses_the_gpu_starts_itself_again(gpu, monkeypatch, tmp_path):
    started = []

    def lose(run, options):
        run.record(case=1, failed="lost")
        raise GpuLostError("lost")

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(linears, "decode", lose)
    monkeypatch.setattr(step.os, "execv", lambda path, argv: started.append(argv))
    command = ["decode", "--out", str(tmp_path), "--seconds", "1e6"]
    monkeypatch.setattr(sys, "argv", ["step.py", *command, "--tokens", "1", "8"])
    path = list(sys.path)
    step.main()
    sys.path[:] = path
    (argv,) = started
    assert argv[2:5] == command[:3]
    assert argv[-4:] == ["--resume", "--tokens", "1", "8"]
    assert 0 < float(argv[6]) < 1e6
