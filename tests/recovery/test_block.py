"""Tests of how a block's error counts its tokens."""

import torch

from llmc_attnmask.recovery.block import relative_errors, token_weights


def test_a_massive_token_counts_as_much_as_any_other():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 6, 8, generator=generator)
    errors = 0.1 * torch.randn(2, 6, 8, generator=generator)
    expected = (errors.square().sum(-1) / targets.square().sum(-1)).mean(-1)
    massive = torch.ones(6, 1)
    massive[0] = 100.0  # a norm 100 times that of the others, with an error to match
    for scale in (torch.ones(6, 1), massive):
        found = relative_errors((targets + errors) * scale, targets * scale)
        torch.testing.assert_close(found, expected)


def test_a_token_without_a_norm_does_not_outweigh_the_others():
    states = torch.ones(1, 4, 8)
    states[0, 1] = 0.0
    weights = token_weights(states)
    assert weights.isfinite().all() and weights[0, 1] < 1e7 * weights[0, 0]
    assert token_weights(torch.zeros(1, 4, 8)).isfinite().all()
