import math
from dataclasses import replace

import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import attention_error
from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.recovery.block import BlockPair
from llmc_attnmask.recovery.error import OutputError
from llmc_attnmask.recovery.refine import RefineSettings, refine
from tests.support.blocks import case_of

SETTINGS = RefineSettings(
    steps=20, learning_rate=0.03, batch_size=4, attention_weight=0.0, seed=0
)


@pytest.fixture
def case(calibration) -> BlockPair:
    return case_of(load_model(MODEL_DIR), calibration[:16])


def run(case: BlockPair, **changes) -> float:
    settings = replace(SETTINGS, **changes)
    found = refine(case, settings, "block")
    assert found.errors[-1] == OutputError(case).mean()
    return found.errors[-1]


def matrix_error(case: BlockPair) -> float:
    """||A - A~||^2 inside the blocks, summed over the samples."""
    total = 0.0
    calls = []
    for block in (case.dense, case.pruned):
        seen: dict = {}
        attention = block.module.self_attn
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(call=(args, kwargs)),
            with_kwargs=True,
        )
        with torch.no_grad():
            block(range(len(block.inputs)))
            calls.append(AttentionReplica(attention)(*seen["call"]))
        handle.remove()
    total += attention_error(calls[0], calls[1].query, calls[1].key).item()
    return total


def test_the_error_falls_and_the_masks_stay(case):
    before = OutputError(case).mean()
    assert run(case) < 0.8 * before
    for name, linear in case.pruned.linears().items():
        zeros = linear.weight[~case.kept[name]]
        assert not zeros.any() and not torch.signbit(zeros).any()
        assert not linear.weight.requires_grad


def test_steps_that_raise_the_error_are_undone(case):
    before = OutputError(case).mean()
    assert run(case, learning_rate=100.0, steps=3) == before


def test_the_attention_term_keeps_the_attention_matrix_closer(calibration):
    errors = []
    for weight in (0.0, 10.0):
        case = case_of(load_model(MODEL_DIR), calibration[:16])
        run(case, attention_weight=weight)
        errors.append(matrix_error(case))
    assert errors[1] < 0.9 * errors[0]


def test_the_same_seed_gives_the_same_bytes(calibration):
    weights = []
    for seed in (1, 1, 2):
        case = case_of(load_model(MODEL_DIR), calibration[:16])
        run(case, seed=seed, steps=4)
        weights.append(case.pruned.linears()["mlp.up_proj"].weight.clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_arithmetic_in_bfloat16_reaches_about_the_same_error(calibration):
    errors = []
    for autocast in (False, True):  # as on a GPU
        case = case_of(load_model(MODEL_DIR), calibration[:16])
        case.dense.autocast = case.pruned.autocast = autocast
        errors.append(run(case, attention_weight=0.1))
        assert case.pruned.linears()["mlp.up_proj"].weight.dtype == torch.float32
    assert errors[1] < 1.1 * errors[0]


def test_a_step_to_infinity_leaves_a_block_as_it_was(calibration, warnings):
    case = case_of(load_model(MODEL_DIR), calibration[:16, :64])
    before = {n: x.weight.clone() for n, x in case.pruned.linears().items()}
    start = OutputError(case).mean()
    settings = replace(SETTINGS, steps=3, learning_rate=math.inf, batch_size=8)
    found = refine(case, settings, "block")
    assert found.errors == [start, start] and found.fallback and warnings
    for name, linear in case.pruned.linears().items():
        assert torch.equal(linear.weight, before[name])
