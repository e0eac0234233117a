from pathlib import Path

import pytest
from transformers import AutoTokenizer

from integration.benchmarks import allocations
from integration.benchmarks.methods import Case, planned
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.oneshot.trade_off import packed_size
from llmc_attnmask.text.dataset import BUILTIN, load_texts
from llmc_attnmask.text.windows import calibration_windows


def choice_of(method: str, output: Path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    windows = calibration_windows(load_texts(BUILTIN), tokenizer, 12, 64)
    case = Case(str(MODEL_DIR), method, "block", "2:4", 0.5, 0, windows)
    return planned(case, output)[0], load_recipe(output).modifiers


def test_uniform_gives_every_group_the_same_sparsity(tmp_path):
    plan, (pruning, _) = choice_of("block_unstructured_60, uniform 0.4", tmp_path / "r")
    assert set(pruning.sparsity.values()) == {0.4}
    assert plan["size"] == pytest.approx(packed_size(0.4))


def test_ends_leaves_the_first_and_last_layers_dense(tmp_path):
    plan, modifiers = choice_of("block_2of4, ends 0.5", tmp_path / "r")
    for pruning in modifiers[:2]:
        dense = set(pruning.ignore) - {"re:.*lm_head"}
        assert dense
        assert all("layers\\.(0|3)\\." in pattern for pattern in dense)
    assert plan["size"] == pytest.approx((1 + packed_size(0.5)) / 2)


@pytest.mark.parametrize("kind", ["owl", "evopress"])
def test_other_allocations_keep_the_average(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(allocations, "_GENERATIONS", 2)
    plan, (pruning, _) = choice_of(f"block_unstructured_60, {kind} 0.6", tmp_path / "r")
    assert len(set(pruning.sparsity.values())) > 1
    assert plan["size"] == pytest.approx(packed_size(0.6), abs=1e-6)
