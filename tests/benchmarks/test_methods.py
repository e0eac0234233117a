from pathlib import Path

import pytest
import torch

from integration.benchmarks.methods import Case, planned
from llmc_attnmask.oneshot.recipe import load_recipe
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.oneshot.trade_off import packed_size


def choice_of(method: str, output: Path):
    case = Case(str(MODEL_DIR), method, "block", "2:4", 0.5, 0, torch.zeros(0))
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
