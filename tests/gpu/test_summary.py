"""Tables of handmade rows: no figure here was measured."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from integration.gpu import summary, targets
from integration.gpu.figures import Figures, by_gpu
from integration.gpu.tables import TABLES
from tests.support.documents import ROOT

SCRIPT = ROOT / "integration" / "gpu" / "summary.py"
RESULTS = SCRIPT.with_name("RESULTS.md")
GPU = {"date": "2026-01-02", "gpu": "A Card"}


def timed(kernel, us, *, shape="gate_up_proj", dtype="bf16", tokens=1, mode="graph"):
    case = {"shape": shape, "dtype": dtype, "tokens": tokens, "kernel": kernel}
    step = "prefill" if tokens > 64 else "decode"
    return {"step": step, **GPU, **case, "mode": mode, "us": us}


def engine(plugin, of, dtype="bf16", **figures):
    case = {"dtype": dtype, "layers": 8, "plugin": plugin, "kernel": None}
    return {"step": "engine", **GPU, **case, "as_installed": False, "of": of, **figures}


DECODED = [
    timed(kernel, us, shape=shape, tokens=tokens)
    for shape in ("gate_up_proj", "down_proj")
    for tokens in (1, 8, 16)
    for kernel, us in (("dense", 100.0), ("triton", 80.0), ("cuda", 50.0 + tokens))
]
ROWS = [
    {
        **{"step": "machine", **GPU, "of": "versions"},
        "versions": {"torch": "2.11.0", "ncu": None, "cusparselt": "800"},
    },
    {"step": "machine", **GPU, "of": "copy", "copy_tb_per_s": 2.5},
    {"step": "machine", **GPU, "of": "state before", "state": {"driver_version": "1"}},
    *(
        {"step": "correct", **GPU, "kernel": "cuda", "dtype": "bf16"}
        | {"tokens": tokens, "rows": 64, "columns": 256}
        | {"eager": error, "graph": error, "right": error < 0.01}
        for tokens, error in ((1, 0.002), (8, 0.5))
    ),
    {"step": "correct", **GPU, "kernel": "triton", "failed": "cut | off"},
    {"step": "correct", **GPU, "kernel": "dense", "dtype": "int8", "missing": "no"},
    {
        **{"step": "decode", **GPU, "shape": "gate_up_proj", "dtype": "bf16"},
        **{"kernel": "cuda", "bytes": 50_000_000, "share": 0.5625},
        **{"pack_seconds": 0.25, "prepare_seconds": 0.0},
    },
    *DECODED,
    timed("dense", 100.0, dtype="fp8"),
    timed("cuda", 90.0, dtype="int8"),
    timed("cuda", 80.0, dtype="fp8"),
    timed("cuda", 999.0, dtype="fp8", tokens=8),  # without dense: compared with nothing
    timed("dense", 100.0, tokens=4096, mode="eager"),
    timed("cusparselt", 125.0, tokens=4096, mode="eager"),
    timed("cusparselt unsearched", 200.0, tokens=4096, mode="eager"),
    engine("off", "decode", batch=1, tokens_per_s=100.0, ms_per_step=10.0),
    engine("on", "decode", batch=1, tokens_per_s=140.0, ms_per_step=7.0),
    engine("off", "decode", batch=16, tokens_per_s=100.0, ms_per_step=10.0),
    engine("on", "decode", batch=16, tokens_per_s=110.0, ms_per_step=9.0),
    engine("off", "memory", linear_gb=2.0),
    engine("on", "memory", linear_gb=1.25),
    engine("on", "decode", dtype="fp8", batch=1, tokens_per_s=50.0)
    | {"kernel": "sparse"},
    engine("on", "tokens", tokens=[[1]], first_tokens_equal=1.0),
    {
        **{"step": "prune", **GPU, "recipe": "block_2of4", "layers": 1},
        **{"samples": 128, "length": 2048, "width": 4096, "tokens": 262144},
        **{"seconds": 30.0, "seconds_per_layer": 30.0, "peak_gb": 20.0},
    },
    {"step": "attention", **GPU, "of": "speed", "length": 1024, "kernel": "fused"}
    | {"ms": 1.5, "peak_mb": 100.0},
    {"step": "profile", "date": "2026-01-03", "gpu": None, "failed": "not started"},
    {"step": "decode", **GPU, "trial": True, "shape": "o_proj", "us": 1.0},
]
MADE = summary.tables(ROWS)


def body(name: str) -> list[str]:
    """A table without the GPU's name above it."""
    first, rest = MADE[name].split("\n\n", 1)
    assert first == "**A Card**"
    return rest.split("\n")


def test_results_stand_beside_their_targets():
    assert body("gpu-targets") == [
        "| what | target | reached |",
        "| --- | --- | --- |",
        "| decode, 1 to 16 tokens, gate_up and down, bf16 over dense bf16 "
        "| 1.5 x (1.78 is the limit by bytes) | 1.52 to 1.96 |",
        "| the same, fp8 over dense fp8 | 1.3 x (1.6 is the limit) "
        "| 1.25 to 1.25 (1 of 6 sizes), missed |",
        "| the same, int8 over dense fp8 | 1.3 x (1.6 is the limit) "
        "| 1.11 to 1.11 (1 of 6 sizes), missed |",
        "| prefill, 4096 tokens, bf16 over dense bf16 | 1.3 x "
        "| 0.80 to 0.80 (1 of 4 sizes), missed |",
        "| the same, fp8 over dense fp8 | 1.4 x | not yet |",
        "| at any size, slower than dense by at most | 3 % (0.97 x) "
        "| 0.80 (bf16 gate_up_proj, 4096 tokens: cusparselt); "
        "1 of 9 sizes below 0.97, missed |",
        "| weights in GPU memory over dense, bf16 | 0.58 | 0.625 (8 layers), missed |",
        "| the same, 8 bits | 0.64 | not yet |",
        "| tokens per second, whole block 2:4 in bf16, batch 1, over dense in the same "
        "vLLM | 1.35 x | 1.40 (8 layers) |",
        "| tokens per second, whole block 2:4 in bf16, batch 16, over dense in the "
        "same vLLM | 1.3 x | 1.10 (8 layers), missed |",
        "| tokens per second, whole block 2:4 in bf16, batch 128, over dense in the "
        "same vLLM | 1.1 x | not yet |",
        "| pruning Llama-3.1-8B's shapes, 128 x 2048 tokens, most accurate recipe, "
        "from the measured layer | 20 minutes, 60 GB "
        "| 16 minutes (30.0 s a layer), 20.0 GB |",
    ]


def test_pruning_that_takes_too_much_time_or_memory_misses_its_target():
    row = {"step": "prune", "samples": 128, "length": 2048, "width": 4096}
    for seconds, peak, missed in (
        (37.0, 59.0, False),
        (38.0, 1.0, True),
        (1, 61, True),
    ):
        figures = Figures([row | {"seconds_per_layer": seconds, "peak_gb": peak}])
        assert targets.pruning(figures).endswith("missed") == missed
    short = row | {"length": 64, "seconds_per_layer": 1.0, "peak_gb": 1.0}
    assert targets.pruning(Figures([short])) == "not yet"


def test_the_machine_is_summarized():
    assert body("gpu-machine") == [
        "- torch: 2.11.0",
        "- cusparselt: 800",
        "- copy: 2.50 TB/s, read and written",
        "- before the products: driver_version 1",
    ]


def test_correctness_names_what_is_wrong_and_what_is_missing():
    assert body("gpu-correct")[2:] == [
        "| cuda | bf16 | **wrong** in 1, such as 8 x 64 x 256 | 2 | 5.0e-01 "
        "| 5.0e-01 |",
        "| triton | all | **failed**: cut \\| off | 0 |  |  |",
        "| dense | int8 | not available: no | 0 |  |  |",
    ]


def test_times_have_their_ratio_and_share_of_the_bandwidth():
    lines = body("gpu-decode")
    assert lines[0] == (
        "| type | shape | tokens | called | dense | dense vllm | cuda | cusparselt "
        "| triton | best over dense | of copy bandwidth |"
    )
    assert lines[2] == (
        "| bf16 | gate_up_proj | 1 | graph | 100.0 |  | 51.0 |  | 80.0 | 1.96 cuda "
        "| 0.39 |"
    )
    (int8,) = [line for line in lines if "int8" in line and "graph" in line]
    assert "| 1.11 cuda |" in int8
    assert body("gpu-prefill")[3] == (
        "| bf16 | gate_up_proj | 4096 | eager | 100.0 |  | 125.0 | 200.0 "
        "| 0.80 cusparselt |"
    )


def test_engines_stand_side_by_side():
    assert body("gpu-serving")[2:] == [
        "| bf16, 8 layers | tokens/s, batch 1 | 100.0 | 140.0 | 1.40 |",
        "| bf16, 8 layers | tokens/s, batch 16 | 100.0 | 110.0 | 1.10 |",
        "| bf16, 8 layers | GB of linear layers | 2.000 | 1.250 | 0.62 |",
        "| bf16, 8 layers | first tokens equal to stock |  | 1.000 |  |",
        "| fp8, 8 layers, LLMC_ATTNMASK_KERNEL=sparse | tokens/s, batch 1 |  "
        "| 50.0 |  |",
    ]


def test_failures_have_a_reason_unless_they_succeeded_later():
    assert body("gpu-failed")[2:] == [
        "| 2026-01-02 | correct | kernel triton | cut \\| off |",
        "| 2026-01-03 | profile |  | not started |",
    ]
    right = timed("cuda", 1.0)
    wrong = {k: v for k, v in right.items() if k != "us"} | {"failed": "x"}
    assert not Figures([wrong, right]).failures()
    assert Figures([right, wrong]).failures() == [wrong]


def test_the_last_of_repeated_measurements_counts():
    figures = Figures([timed("dense", 5.0), timed("dense", 7.0)])
    assert figures.dense("gate_up_proj", "bf16", 1, "graph") == 7.0


def test_gpus_are_kept_apart_and_trials_are_left_out():
    other = timed("dense", 1.0) | {"gpu": "B Card"}
    found = by_gpu([*ROWS, other])
    assert found.keys() == {"A Card", "B Card"} and found["B Card"] == [other]
    assert not any("trial" in row for row in found["A Card"])
    assert by_gpu([ROWS[-1]]) == {}
    both = summary.tables([*ROWS, other])["gpu-targets"]
    assert both.count("**A Card**") == both.count("**B Card**") == 1


def test_without_results_every_table_says_not_yet():
    made = summary.tables([])
    assert made.pop("gpu-state") == "**Nothing here has been measured yet.**"
    rows = made.pop("gpu-targets").split("\n")[2:]
    assert len(rows) == len(targets.TABLE) == 12
    assert all(line.endswith("| not yet |") for line in rows)
    assert set(made.values()) == {"not yet"}


def test_results_md_has_every_table_and_matches_what_was_measured():
    text = RESULTS.read_text(encoding="utf-8")
    names = re.findall(r"<!-- table: ([\w-]+) -->", text)
    assert sorted(names) == sorted(TABLES)
    rows, _ = summary.read_all(sorted(summary.MEASURED.glob("*.jsonl")))
    assert summary.written(text, summary.tables(rows)) == text, (
        "run python integration/gpu/summary.py and look at the difference"
    )


@pytest.mark.parametrize("printed", [True, False])
def test_the_command_skips_a_broken_line_and_writes_the_document(tmp_path, printed):
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(4, lines[4][:30])
    (tmp_path / "found.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:9])
    copy = shutil.copy(RESULTS, tmp_path / "RESULTS.md")
    before = copy.read_text()
    command = [sys.executable, str(SCRIPT), str(tmp_path / "found.jsonl")]
    command += ["--print"] if printed else ["--results", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "found.jsonl: 2 broken lines are skipped" in done.stdout
    assert "found.jsonl: 1 rows of a trial on a CPU are skipped" in done.stdout
    assert MADE["gpu-targets"] in done.stdout
    after = copy.read_text()
    assert after == (before if printed else summary.written(before, MADE))
    assert printed or "1.52 to 1.96" in after
