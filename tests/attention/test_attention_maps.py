"""Attention maps keep their values to 8 bits."""

import base64
import zlib

import numpy as np
import pytest
import torch

from llmc_attnmask.attention.attention_maps import (
    TOKENS,
    attention_maps,
    inflated,
    zeros_by_head,
)
from llmc_attnmask.attention.capture import AttentionCall
from tests.support.attention import probabilities


def call(length: int, seed: int, heads: int = 3, groups: int = 1) -> AttentionCall:
    torch.manual_seed(seed)
    mask = torch.full((length, length), -1e9).triu(1)[None, None]
    query = torch.randn(1, heads, length, 8)
    key, value = torch.randn(2, 1, groups, length, 8)
    return AttentionCall(query, key, value, mask, scaling=1.0)


@pytest.mark.parametrize("length", [20, TOKENS + 30])
def test_the_worst_and_the_median_head_are_mapped(length):
    dense = call(length, 0)
    query = dense.query.clone()
    for head, change in enumerate((0.1, 3.0, 0.5)):
        query[:, head] *= 1 + change
    pruned = AttentionCall(query, dense.key, dense.value, dense.mask, scaling=1.0)
    found = attention_maps(dense, pruned)
    shown = min(length, TOKENS)
    assert [attention_map.head for attention_map in found] == [1, 2]
    for attention_map in found:
        a, b = (
            probabilities(c)[0, attention_map.head, :shown, :shown]
            for c in (dense, pruned)
        )
        error = (b - a).square().sum() / a.square().sum()
        assert attention_map.error == pytest.approx(error.item(), rel=1e-4)
        stored = attention_map.encode()
        assert stored["tokens"] == shown
        packed = np.frombuffer(
            zlib.decompress(base64.b64decode(stored["dense"])), np.uint8
        ).reshape(shown, shown)
        assert np.abs((packed / 255) ** 2 - a.numpy()).max() < 1 / 255
        raw = base64.b64decode(inflated(stored["difference"]))
        change = (np.frombuffer(raw, np.uint8) - 128.0) / 127
        change *= stored["largest_difference"]
        wrong = np.abs(change.reshape(shown, shown) - (b - a).numpy())
        assert wrong.max() <= stored["largest_difference"] / 127


def test_equal_calls_give_an_empty_difference():
    dense = call(10, 0, heads=1)
    (attention_map,) = attention_maps(dense, dense)
    assert attention_map.encode()["largest_difference"] == 0.0


def test_heads_divide_the_rows_of_q_and_the_columns_of_o():
    kept = torch.ones(4, 8, dtype=torch.bool)
    kept[:2, :4] = False
    assert zeros_by_head("q", kept, 2) == [0.5, 0.0]
    assert zeros_by_head("o", kept, 4) == [0.5, 0.5, 0.0, 0.0]
