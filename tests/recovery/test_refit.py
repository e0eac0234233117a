from dataclasses import replace

import pytest
import torch

from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.recovery.block import block_error
from llmc_attnmask.recovery.refit import _by_input, _residual_writers, refit
from tests.support.architectures import small_model
from tests.support.blocks import case_of

LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def test_survivors_compensate_for_most_of_magnitude_pruning(calibration):
    case = case_of(load_model(MODEL_DIR), calibration)
    before = block_error(case.pruned, case.targets)
    refit(case)
    assert block_error(case.pruned, case.targets) < 0.4 * before
    for name, linear in case.pruned.linears().items():
        assert not linear.weight[~case.kept[name]].any()


def test_linears_are_grouped_by_input_in_the_order_in_which_they_run(calibration):
    case = case_of(load_model(MODEL_DIR), calibration[:2])
    names = sorted(case.kept)
    assert [sorted(group) for group in _by_input(case.dense, names)] == [
        sorted(group) for group in LLAMA
    ]


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("gemma2", []),  # norms follow o_proj and down_proj
        ("phi3", ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_linears_that_write_to_the_residual_stream_are_found_by_trial(family, expected):
    case = case_of(small_model(family), torch.randint(3, 64, (2, 12)))
    names = [name for group in _by_input(case.dense, list(case.kept)) for name in group]
    assert _residual_writers(case.dense, names) == expected


def test_an_unpruned_block_in_an_unpruned_model_stays_as_it_is(calibration):
    case = case_of(load_model(MODEL_DIR), calibration[:8], index=0)
    everything = {name: mask | True for name, mask in case.kept.items()}
    case.pruned.module.load_state_dict(case.dense.module.state_dict())
    refit(replace(case, kept=everything))
    assert block_error(case.pruned, case.targets) < 1e-5
