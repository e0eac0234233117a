"""The steps on a CPU with small shapes, and their plain arithmetic."""

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from integration.gpu import record, timing, weights
from integration.gpu.context import Context
from integration.gpu.steps import (
    attention,
    checkpoint,
    compiling,
    correct,
    cusparselt_checks,
    engine,
    linears,
    profile,
)
from tests.support.documents import ROOT
from tests.support.interpreter import interpreted

STEP = ROOT / "integration" / "gpu" / "step.py"
NONE = argparse.Namespace()


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch):
    monkeypatch.setattr(timing, "REPLAYS", (1, 1))


def trial(tmp_path, name: str) -> Context:
    return Context(step=name, folder=tmp_path, device="cpu")


def rows_of(tmp_path) -> list[dict]:
    rows = record.read(tmp_path / record.FILE).rows
    assert all(row["trial"] for row in rows)
    return rows


@interpreted
@pytest.mark.parametrize("kernel", ["triton", "dense"])
def test_kernels_are_checked_on_a_cpu(tmp_path, kernel):
    correct.check_kernel(trial(tmp_path, "correct"), kernel)
    rows = rows_of(tmp_path)
    assert not [row for row in rows if "failed" in row]
    assert all(row.get("right", True) for row in rows)
    assert {row["dtype"] for row in rows} == set(weights.DTYPES)


@interpreted
def test_decoding_is_timed_on_a_cpu(tmp_path):
    options = argparse.Namespace(
        shapes=["o_proj"], dtypes=["bf16", "int8"], tokens=[3], kernels=None
    )
    linears.decode(trial(tmp_path, "decode"), options)
    rows = rows_of(tmp_path)
    assert not [row for row in rows if "failed" in row]
    assert {(r["dtype"], r["kernel"], r["mode"]) for r in rows if "us" in r} == {
        (dtype, kernel, mode)
        for dtype, kernel in (("bf16", "dense"), ("bf16", "triton"), ("int8", "triton"))
        for mode in ("graph", "eager")
    }


@interpreted
def test_kernels_are_compiled_by_a_first_call():
    found = compiling.compile_one(
        {"kernel": "triton", "dtype": "int8", "shape": "o_proj"}, "cpu"
    )
    assert 0 < found["slowest"] <= found["seconds"]
    tasks = list(compiling.tasks(trial=False))
    assert len(tasks) == 4 * 3 + 1 + 4
    missing = compiling.compile_one(
        {"kernel": "cuda", "dtype": "bf16", "shape": "odd"}, "cpu"
    )
    assert missing == {"missing": "needs a GPU"}


def test_missing_kernels_are_recorded_with_the_reason(tmp_path):
    cusparselt_checks.run(trial(tmp_path, "cusparselt"), NONE)
    profile.run(trial(tmp_path, "profile"), argparse.Namespace(launch=False))
    assert all("missing" in row for row in rows_of(tmp_path))


def test_the_attention_error_is_compared_with_float64():
    deviations = attention.deviation(32, "cpu")
    assert 0 < max(deviations.values()) < 1e-4


def _asked(call) -> bool:
    return attention.matrix._fusible(call)


def test_the_way_to_compute_the_attention_error_can_be_chosen():
    real = attention.matrix._fusible
    for dtype in (torch.float32, torch.float64):
        call, *_ = attention.random_inputs(16, dtype, "cpu")
        for fused in (True, False):
            seen = attention.choosing(
                fused, lambda c: attention.matrix._fusible(c), call
            )
            assert seen == (fused and dtype == torch.float32)
    assert attention.matrix._fusible is real


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["machine"],
        ["compile"],
        ["correct"],
        ["attention"],
        ["profile", "--launch"],
        ["prune", "--width", "128", "--samples", "2", "--length", "32"],
        ["checkpoint", "--layers", "1", "--dtype", "int8", "--folder", "{}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_steps_run_as_commands(tmp_path, arguments):
    command = [sys.executable, str(STEP), arguments[0], "--cpu", "--out", str(tmp_path)]
    command += [x.format(tmp_path / "model") for x in arguments[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr
    if arguments[0] == "profile":  # only launches
        assert not (tmp_path / record.FILE).exists()
        return
    rows = rows_of(tmp_path)
    assert rows and not [row for row in rows if "failed" in row]


@pytest.mark.parametrize("name", ["decode", "engine"])
def test_a_step_without_a_gpu_says_so_and_ends_well(tmp_path, name):
    command = [sys.executable, str(STEP), name, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name} skipped: no CUDA GPU on this machine\n"
    assert not (tmp_path / "out").exists()


def test_a_weight_is_2of4_with_two_kept_in_every_group():
    torch.manual_seed(0)
    for dtype in weights.DTYPES.values():
        weight = weights.random_weight(64, 256, dtype, "cpu")
        kept = (weight.dense.float() != 0).view(-1, 4).sum(1)
        assert kept.max() == 2 and kept.float().mean() > 1.8
        assert (weight.scale is None) == (dtype.itemsize == 2)


def test_enough_weights_rotate_to_exceed_every_cache():
    for shape in weights.SHAPES.values():
        for itemsize in (1, 2):
            sparse = shape[0] * shape[1] * itemsize * 0.5625
            assert weights.copies(*shape, itemsize) * sparse > 2 * 60e6


def test_repetitions_fit_their_time():
    assert timing.BUDGET == 60
    least, most = 5, 20
    timing.REPLAYS = (least, most)  # few_repetitions puts it back
    assert timing.repetitions(0.01) == most
    assert timing.repetitions(1000) == least
    assert timing.repetitions(6.0) == 10


LONG = """==PROF== Connected to process 1
"ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","void FillFunctor<float>","(1, 1, 1)","","gpu__time_duration.sum","us","1.0"
"1","sparse, one","(64, 1, 1)","","gpu__time_duration.sum","us","12.5"
"1","sparse, one","(64, 1, 1)","","launch__registers_per_thread","register/thread","96"
"2","add","(2, 1, 1)","","gpu__time_duration.sum","us","2.0"
"3","void FillFunctor<float>","(1, 1, 1)","","gpu__time_duration.sum","us","1.0"
"4","other","(3, 1, 1)","","unknown","us","3.0"
"""
WIDE = """"ID","Kernel Name","Grid Size","gpu__time_duration.sum"
"","","","us"
"0","void FillFunctor<float>","(1, 1, 1)","1.0"
"1","sparse","(64, 1, 1)","12.5"
"""


def test_counters_are_read_from_both_forms_of_the_csv():
    cases = profile.by_case(profile.parse(LONG.splitlines()))
    assert cases == [
        [
            {"launch": "sparse, one", "grid": "(64, 1, 1)"}
            | {"duration": "12.5 us", "registers": "96 register/thread"},
            {"launch": "add", "grid": "(2, 1, 1)", "duration": "2.0 us"},
        ],
        [{"launch": "other", "grid": "(3, 1, 1)"}],
    ]
    assert profile.by_case(profile.parse(WIDE.splitlines())) == [
        [{"launch": "sparse", "grid": "(64, 1, 1)", "duration": "12.5 us"}]
    ]
    assert profile.parse(["==ERROR== no permission"]) == []


def test_counters_are_recorded_by_case(tmp_path, monkeypatch):
    monkeypatch.setattr(profile.shutil, "which", lambda _: "/usr/bin/ncu")
    case = {"dtype": "bf16", "shape": "o_proj", "tokens": 1, "kernel": "cuda"}
    monkeypatch.setattr(profile, "cases", lambda _: iter([case]))
    asked = []

    def profiled(ncu, metrics, context):
        asked.append(metrics)
        return (1, "==ERROR== unknown metric") if len(asked) == 1 else (0, LONG)

    monkeypatch.setattr(profile, "profiled", profiled)
    profile.run(trial(tmp_path, "profile"), argparse.Namespace(launch=False))
    failed, *found = rows_of(tmp_path)
    assert failed["failed"] == "ncu ended with 1: ==ERROR== unknown metric"
    assert [row["launch"] for row in found] == ["sparse, one", "add"]
    assert asked == [list(profile.METRICS), list(profile.METRICS)[:2]]
    assert found[0]["registers"] == "96 register/thread"


def test_fewer_layers_keep_their_share_of_the_bytes():
    whole = checkpoint.configuration(32, trial=False)
    part = checkpoint.configuration(8, trial=False)
    assert (whole["vocab_size"], part["vocab_size"]) == (128256, 128256 // 4)
    shapes = checkpoint.linears(whole)
    assert sum(r * c for r, c in shapes.values()) == sum(
        r * c for r, c in weights.SHAPES.values()
    )


def test_a_checkpoint_is_found_by_its_properties(tmp_path):
    options = argparse.Namespace(dtype="fp8", layers=1, folder=tmp_path)
    run = trial(tmp_path, "checkpoint")
    checkpoint.run(run, options)
    folder = checkpoint.made(run.rows(), "fp8", 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert (folder / "model-layer-00.safetensors").exists()
    with pytest.raises(RuntimeError, match="no bf16 checkpoint of 8 layers was made"):
        checkpoint.made(run.rows(), "bf16", 8)
    checkpoint.run(run, options)  # replaces the one before
    assert "failed" not in run.rows()[-1]


def test_a_checkpoint_goes_where_there_is_room(monkeypatch):
    free = dict(zip(checkpoint.FOLDERS, (10, 1000), strict=True))
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda x: SimpleNamespace(free=free[x])
    )
    assert checkpoint.folder_with_room(5) == checkpoint.FOLDERS[0]
    assert checkpoint.folder_with_room(500) == checkpoint.FOLDERS[1]
    with pytest.raises(OSError, match="no room"):
        checkpoint.folder_with_room(5000)


def test_answers_agree_until_they_differ():
    found = engine.agreement([[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 9, 4], [5, 2, 3, 4]])
    assert found == {"first_tokens_equal": 0.5, "equal_until_they_part": 0.25}


def test_greedy_answers_are_compared_with_those_of_the_stock_engine(tmp_path):
    case = {"dtype": "bf16", "layers": 8, "plugin": "on", "kernel": None}
    run = trial(tmp_path, "engine")
    server = SimpleNamespace(tokens=lambda *_: [[1, 2]])
    assert engine.greedy(run, server, case, (1, 1, 2)) == {"tokens": [[1, 2]]}
    stock = case | {"plugin": "off", "of": "tokens"}
    run.record(**stock, tokens=[[1, 3]])
    found = engine.greedy(run, server, case, (1, 1, 2))
    assert found["equal_until_they_part"] == 0.5


def test_bytes_of_linear_layers_are_counted_once():
    layer = torch.nn.Module()
    layer.qkv_proj = torch.nn.Linear(4, 8, bias=False)
    layer.o_proj = torch.nn.Module()
    layer.o_proj.register_buffer("whole", torch.zeros(10))
    layer.o_proj.register_buffer("part", layer.o_proj.whole[:5])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    model.lm_head = torch.nn.Linear(4, 100)
    outer = torch.nn.Module()
    outer.model = model
    assert engine.linear_bytes(outer) == 4 * (32 + 10)


def test_a_reduced_vllm_captures_the_measured_batches():
    how = engine.arguments(as_installed=False, trial=False, longest=2304)
    sizes = how["compilation_config"]["cudagraph_capture_sizes"]
    assert sizes == [1, 16, 128] and how["max_num_seqs"] == 128
    assert "compilation_config" not in engine.arguments(True, False, 2304)
