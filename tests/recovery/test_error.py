"""Tests of how a block's error counts its tokens and channels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmc_attnmask.evaluation.perplexity import load_model
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from llmc_attnmask.recovery.error import (
    OutputError,
    channel_weights,
    relative_errors,
)
from tests.support.blocks import case_of


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    """Targets [2, 6, 8] and errors a tenth as large."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 6, 8, generator=generator)
    return targets, 0.1 * torch.randn(2, 6, 8, generator=generator)


def test_a_massive_token_counts_as_much_as_any_other(states):
    targets, errors = states
    expected = (errors.square().sum(-1) / targets.square().sum(-1)).mean(-1)
    massive = torch.ones(6, 1)
    massive[0] = 100.0  # a norm 100 times that of the others, with an error to match
    for scale in (torch.ones(6, 1), massive):
        found = relative_errors(
            (targets + errors) * scale, targets * scale, torch.ones(8)
        )
        torch.testing.assert_close(found, expected)


def test_a_massive_channel_does_not_hide_errors_in_the_others(states):
    targets, errors = states
    errors[..., 3] = 0.0
    massive = torch.ones(8)
    massive[3] = 100.0
    found = []
    for scale in (torch.ones(8), massive):
        shares = (targets * scale).square().sum((0, 1))
        outputs = (targets + errors) * scale
        found.append(relative_errors(outputs, targets * scale, channel_weights(shares)))
    assert (found[1] > 0.5 * found[0]).all()  # unweighted, it is about a thousandth


def test_channels_of_ordinary_size_count_alike():
    shares = torch.tensor([0.0, 0.5, 1.0, 1.0, 15.9, 64.0])
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.25])
    torch.testing.assert_close(channel_weights(shares), expected)
    assert (channel_weights(torch.zeros(4)) == 1.0).all()


def test_a_token_without_a_norm_does_not_outweigh_the_others():
    targets = torch.ones(1, 4, 8)
    targets[0, 1] = 0.0
    found = relative_errors(1.001 * targets + 1e-9, targets, torch.ones(8))
    assert found.item() < 1e-5
    zeros = torch.zeros(1, 4, 8)
    assert relative_errors(zeros, zeros, torch.ones(8)).item() == 0.0


def test_a_blocks_channels_are_weighed_by_their_shares_in_all_samples(calibration):
    pair = case_of(load_model(MODEL_DIR), calibration[:4, :64])
    massive = torch.ones_like(torch.stack(list(pair.targets)))
    massive[..., 3] = 100.0
    massive[2, ..., 5] = 100.0  # in one sample only
    massive[1, :, :8, 7] = 1000.0  # in a few tokens only
    targets = [pair.targets[sample] * massive[sample] for sample in range(4)]
    squares = torch.cat(targets).square()
    weights = channel_weights((squares / squares.sum(-1, keepdim=True)).sum((0, 1)))
    assert weights[3] < 0.1 and (weights < 1).sum() > 1
    error = OutputError(replace(pair, targets=targets))
    torch.testing.assert_close(error.weights, weights)
    with torch.no_grad():
        expected = relative_errors(pair.pruned(range(4)), torch.cat(targets), weights)
    torch.testing.assert_close(error.of(range(4)).detach(), expected)
    assert error.mean() == pytest.approx(expected.mean().item(), rel=1e-5)
