"""Rows of the real model: which, known by what, on the disk, and as a table."""

import argparse
import json

import pytest

from integration.benchmarks import real, real_table
from integration.benchmarks.real_plan import Plan, expected, left, plans
from integration.gpu import record
from llmc_attnmask.oneshot.shipped import MODEL_DIR, recipes
from scripts import measured_tables


def row(method="SparseGPT", scope="block", structure="2:4", seed=None, **others):
    perplexity = others.pop("perplexity", 40.0)
    loss = {"windows": 4, "perplexity": perplexity, "gap": perplexity - 20.0}
    return {
        "digest": f"{method} {scope} {structure} {seed} {others}",
        "date": "2026-01-01",
        "model": "some-model",
        "method": method,
        "scope": scope,
        "structure": structure,
        "calibration": {"text": "wikipedia.jsonl", "windows": 128, "length": 512},
        "seed": seed,
        "texts": {"wikipedia": loss | {"nats": others.pop("nats", 0.5)}},
        "attention_error": 0.0125,
        "answers": {"kl": 0.25, "agreement": 0.875, "tokens": 100},
        "seconds": 61.2,
        "peak_gb": 1.5,
        "total_seconds": 100.0,
    } | others


def written(tmp_path, *rows):
    for each in rows:
        record.append_to(tmp_path / "real.jsonl", each)
    return tmp_path / "real.jsonl"


def test_every_shipped_recipe_of_the_block_is_measured_after_sparsegpt():
    found = plans()
    assert len(set(found)) == len(found)
    assert found[0] == Plan("SparseGPT", "block", "2:4")
    assert found[1] == Plan("block_2of4", "block", "2:4")
    block = {name for name in recipes() if name.startswith("block_")}
    assert block and block <= {plan.method for plan in found}


def test_the_time_left_comes_from_the_closest_earlier_rows():
    todo = [Plan("ALPS", "block", "2:4"), Plan("Wanda", "block", "50 %")]
    assert expected(todo, [row("dense", scope="")]) is None
    assert "known after the first" in left(todo, [])
    rows = [row("ALPS", total_seconds=50.0), row("SparseGPT", total_seconds=1000.0)]
    assert expected(todo, rows) == 50 + (50 + 1000) / 2
    assert left(todo, rows) == "2 rows are left, about 10 min"
    assert left([], rows) == "all rows are measured"


def test_the_table_has_means_ranges_and_multiples_of_sparsegpts_loss(tmp_path):
    file = written(
        tmp_path,
        row("dense", scope="", structure="", perplexity=20.0, nats=0.0, answers=None),
        row("SparseGPT"),
        row("block_2of4", seed=0, perplexity=29.0, nats=0.3),
        row("block_2of4", seed=1, perplexity=31.0, nats=0.4),
        row("block_2of4_fp8", seed=0, attention_error=None),
    )
    table = measured_tables.real(file).splitlines()
    assert table[0] == (
        "| pruned | calibration | method | wikipedia: perplexity | gap (x SparseGPT's) "
        "| nats (x) | same token | KL | attention error | seconds | peak GB |"
    )
    assert table[2] == "|  |  | dense | 20.00 |  |  |  |  | 0.0125 |  |  |"
    assert table[3] == (
        "| whole block, 2:4 | 128 x 512 of wikipedia.jsonl | SparseGPT | 40.00 "
        "| +20.00 (1.00) | +0.500 (1.00) | 87.5% | 0.250 | 0.0125 | 61 | 1.50 |"
    )
    assert table[4] == (
        "| whole block, 2:4 | 128 x 512 of wikipedia.jsonl | `block_2of4` | 30.00 "
        "| +10.00 [+9.00, +11.00] (0.50) | +0.350 [+0.300, +0.400] (0.70) "
        "| 87.5% | 0.250 | 0.0125 | 61 | 1.50 |"
    )
    assert table[5].endswith(
        "| +20.00 (1.00) | +0.500 (1.00) | 87.5% | 0.250 |  | 61 | 1.50 |"
    )


def test_the_summary_has_two_texts_their_multiples_and_the_equal_tokens(tmp_path):
    file = written(
        tmp_path,
        row("dense", scope="", structure="", perplexity=20.0, nats=0.0),
        row("SparseGPT"),
        row("block_2of4", seed=0, perplexity=26.0),
    )
    table = measured_tables.real_summary(file).splitlines()
    assert table[2] == "|  |  | dense | 20.00 |  | 87.5% |  |"
    assert table[4] == (
        "| whole block, 2:4 | 128 x 512 of wikipedia.jsonl | `block_2of4` | 26.00 "
        "| 0.30 | 87.5% | 61 |"
    )


def test_no_multiple_of_a_loss_that_is_none(tmp_path):
    file = written(tmp_path, row(perplexity=19.0, nats=-0.05), row("ALPS"))
    assert "| ALPS | 40.00 | +20.00 | +0.500 |" in real_table.written(file)


def test_a_recipe_that_has_changed_replaces_its_row_and_models_do_not_mix(tmp_path):
    file = written(
        tmp_path,
        row("block_2of4", seed=0, perplexity=30.0, digest="old"),
        row("block_2of4", seed=0, perplexity=25.0, digest="new"),
        row("block_2of4", seed=0, perplexity=99.0, model="other"),
    )
    one, other = real_table.written(file).split("\n\nother\n\n")
    assert one.startswith("some-model\n\n")
    assert "25.00" in one and "30.00" not in one and "99.00" not in one
    assert "99.00" in other


def options(tmp_path, **changed) -> argparse.Namespace:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    known = {
        "model": MODEL_DIR,
        "calibration": [str(text)],
        "texts": {"fox": str(text)},
        "num_samples": 2,
        "seeds": [0, 1],
        "out": tmp_path / "real.jsonl",
        "keep": None,
    }
    return argparse.Namespace(**known | changed)


def test_a_row_is_known_by_what_its_figures_depend_on(tmp_path):
    first = real.Benchmark(options(tmp_path))
    found = {}
    for plan, run in first.runs("2:4 (SparseGPT|block_2of4|magnitude)$"):
        found[plan.name, run.seed] = first.digest(run)
    assert len(set(found.values())) == len(found)
    assert ("block 2:4 block_2of4", 1) in found  # each seed is a row of its own,
    assert ("block 2:4 SparseGPT", 1) not in found  # but not without randomness
    more = real.Benchmark(options(tmp_path, num_samples=3))
    same = {
        plan.name
        for plan, run in more.runs("2:4 (SparseGPT|block_2of4|magnitude)$")
        if more.digest(run) == found[plan.name, run.seed]
    }
    # these do not read the calibration
    assert same == {"  dense", "q/k 2:4 magnitude", "block 2:4 magnitude"}


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tmp_path, capsys):
    benchmark = real.Benchmark(options(tmp_path))
    assert real.run_all(benchmark, "q/k 2:4 magnitude") == []
    whole = benchmark.file.read_text()
    dense, magnitude = map(json.loads, whole.splitlines())
    assert dense["texts"]["fox"]["gap"] == 0 == dense["attention_error"]
    loss = magnitude["texts"]["fox"]
    assert loss["gap"] == loss["perplexity"] - dense["texts"]["fox"]["perplexity"] != 0
    assert magnitude["attention_error"] > 0.01 and magnitude["peak_gb"] > 0.1
    assert magnitude["versions"]["torch"]

    benchmark.file.write_text(whole[:-20])  # cut in the middle of the last line
    capsys.readouterr()
    assert real.run_all(benchmark, "q/k 2:4 magnitude") == []
    assert "1 row is left" in capsys.readouterr().out
    again = record.read(benchmark.file, key="digest")
    assert [r["digest"] for r in again.rows] == [dense["digest"], magnitude["digest"]]
    assert again.rows[1]["texts"] == magnitude["texts"]
    real.run_all(benchmark, "q/k 2:4 magnitude")
    assert "all rows are measured" in capsys.readouterr().out
