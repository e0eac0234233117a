from dataclasses import asdict

import pytest
from rich.console import Console

from llmc_attnmask.cli import tables
from llmc_attnmask.serving.bench.result import Bench, Kind, Time

TIMES = [Time(1, 3.0, 1.5), Time(512, 40.0, 50.0)]
KIND = Kind(
    layers=16,
    name="gate_proj+up_proj",
    rows=16384,
    columns=2048,
    zeros=0.6,
    storage="sparse-bitmask",
    kernel="avx512",
    reason="unstructured, 2.0 x as fast as dense",
    dense_bytes=67_108_864,
    sparse_bytes=31_037_849,
    times=TIMES,
)
FOUND = Bench(
    model="DIR",
    machine="a machine",
    vllm="0.32.0",
    rival="UnquantizedLinearMethod",
    kinds=[KIND],
    dense_bytes=16 * KIND.dense_bytes,
    sparse_bytes=16 * KIND.sparse_bytes,
    times=TIMES,
    left_out=8,
)


def test_a_ratio_above_one_means_that_sparse_is_faster():
    assert TIMES[0].ratio == 2 and TIMES[1].ratio == pytest.approx(0.8)
    assert asdict(FOUND)["kinds"][0]["times"][0]["ratio"] == 2


def test_the_table_shows_layers_bytes_times_and_the_rival():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(tables.bench(FOUND))
    shown = capture.get()
    for text in (
        *("DIR on a machine", "16 x gate_proj+up_proj, 16384 x 2048"),
        *("60% zeros, stored sparse-bitmask", "avx512: unstructured, 2.0 x as fast"),
        *("67.1", "31.0", "1073.7", "3.000", "1.500", "2.00 x", "0.80 x"),
        *("UnquantizedLinearMethod of version 0.32.0", "nor are 8 Linears of experts"),
    ):
        assert text in shown, text
