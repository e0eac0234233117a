"""Read hardware counters of the decode kernels, where Nsight Compute is installed.

Clocks stay as they are. A tiny kernel marks where a case begins, so that the launches
in ncu's output can be told apart by position, not by name.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from integration.gpu.context import Context
from integration.gpu.kernels import SPARSE, Packed, missing, pack
from integration.gpu.steps.correct import wrong
from integration.gpu.weights import (
    DTYPES,
    SHAPES,
    SMALL,
    random_tokens,
    random_weight,
)

METRICS = {  # ncu's name -> name in the results
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "dram_read",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "alu_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_shared_mem": "blocks_by_shared_memory",
}
CASES = (  # type, shape, tokens
    ("bf16", "gate_up_proj", 1),
    ("bf16", "gate_up_proj", 16),
    ("fp8", "gate_up_proj", 1),
    ("fp8", "gate_up_proj", 16),
    ("bf16", "o_proj", 1),
)
MARK = "FillFunctor"  # in the name of the kernel that `fill_` launches


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launch", action="store_true", help="only launch the kernels, under ncu"
    )


def cases(context: Context) -> Iterator[dict[str, Any]]:
    """Yield what is launched, in order; the same in the profiled process."""
    out = wrong(context.rows())
    for kind, shape, tokens in CASES:
        for kernel in SPARSE:
            size = (SMALL if context.trial else SHAPES)[shape]
            if (kernel, kind) in out or (kernel, None) in out:
                continue
            if not missing(kernel, DTYPES[kind], size, context.device):
                yield {
                    "dtype": kind,
                    "shape": shape,
                    "tokens": tokens,
                    "kernel": kernel,
                }


def launch(context: Context) -> None:
    """Call every case once, each after a mark; nothing else is profiled."""
    device = context.device
    mark = torch.zeros(1, device=device)
    ready: list[tuple[Packed, Any]] = []
    for case in cases(context):
        shape = (SMALL if device == "cpu" else SHAPES)[case["shape"]]
        dtype = DTYPES[case["dtype"]]
        packed = pack(case["kernel"], random_weight(*shape, dtype, device))
        packed.prepare([case["tokens"]])
        inputs = random_tokens(case["tokens"], shape[1], dtype, device)
        packed(*inputs)
        ready.append((packed, inputs))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
    for packed, inputs in ready:
        mark.fill_(1)
        packed(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def run(context: Context, options: argparse.Namespace) -> None:
    if options.launch:
        launch(context)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        context.record(missing="ncu is not on PATH")
        return
    for metrics in (
        list(METRICS),
        list(METRICS)[:2],
    ):  # an unknown metric ends the whole run
        code, printed = profiled(ncu, metrics, context)
        (context.folder / "ncu.csv").write_text(printed)
        launches = parse(printed.splitlines())
        if launches:
            break
        last = (printed.strip().splitlines() or ["nothing printed"])[-1]
        context.record(failed=f"ncu ended with {code}: {last[:200]}")
    for case, found in zip(cases(context), by_case(launches), strict=False):
        for one in found:
            context.record(**case, **(one | {"launch": one["launch"][:80]}))


def profiled(ncu: str, metrics: list[str], context: Context) -> tuple[int, str]:
    """Run ``launch`` under ncu; returns the exit code and the output."""
    done = subprocess.run(
        [
            *(ncu, "--csv", "--profile-from-start", "off", "--clock-control", "none"),
            *("--print-kernel-base", "demangled", "--metrics", ",".join(metrics)),
            *(sys.executable, str(Path(__file__).parents[1] / "step.py")),
            *("profile", "--launch", "--out", str(context.folder)),
            *(["--cpu"] if context.trial else []),
        ],
        stdout=subprocess.PIPE,
        text=True,
        timeout=min(max(context.left(), 0.1), 1e6),
    )
    return done.returncode, done.stdout


def parse(lines: Iterable[str]) -> list[dict[str, str]]:
    """Parse launches, in order and with their metrics, from either of ncu's CSV forms.

    Values are ncu's, with its units, such as ``12.5 us``.
    """
    rows = csv.reader(line for line in lines if line.startswith('"'))
    header = next(rows, None)
    if header is None:
        return []
    launches: dict[str, dict[str, str]] = {}
    units: list[str] = []
    for cells in rows:
        row = dict(zip(header, cells, strict=False))
        if not row.get("ID"):
            units = cells  # the form with one column per metric
            continue
        launch = launches.setdefault(row["ID"], {"launch": row["Kernel Name"]})
        launch["grid"] = row.get("Grid Size", "")
        if "Metric Name" in row:
            if row["Metric Name"] in METRICS:
                value = f"{row['Metric Value']} {row.get('Metric Unit', '')}"
                launch[METRICS[row["Metric Name"]]] = value.strip()
            continue
        by_name = dict(zip(header, units, strict=False))
        for metric, name in METRICS.items():
            if metric in row:
                launch[name] = f"{row[metric]} {by_name.get(metric, '')}".strip()
    return list(launches.values())


def by_case(launches: Iterable[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Split launches into those after each mark."""
    found: list[list[dict[str, str]]] = []
    for launch in launches:
        if MARK in launch["launch"]:
            found.append([])
        elif found:
            found[-1].append(launch)
    return found
