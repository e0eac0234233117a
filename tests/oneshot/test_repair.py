import pytest

from llmc_attnmask.oneshot.repair import left_by_recovery

BLOCKS = ["model.layers.1", "model.layers.2", "model.layers.10"]


def costs(*of: dict[float, float]) -> dict:
    return {f"{b}.mlp.down_proj": each for b, each in zip(BLOCKS, of, strict=True)}


def test_the_last_block_weighs_three_times_as_much_as_the_first():
    found = left_by_recovery(costs({0.5: 1.0}, {0.5: 1.0}, {0.5: 1.0}), BLOCKS)
    first, middle, last = (of[0.5] for of in found.values())
    assert last / first == pytest.approx(3)
    assert middle / first == pytest.approx(3**0.5)


def test_the_sum_with_everything_pruned_stays():
    found = left_by_recovery(costs({0.5: 0.1}, {0.5: 0.5}, {0.5: 0.3}), BLOCKS)
    assert sum(of[0.5] for of in found.values()) == pytest.approx(0.9)


def test_a_groups_costs_keep_their_ratio():
    before = costs({0.4: 0.1, 0.7: 0.4}, {0.4: 0.2, 0.7: 0.3}, {0.4: 0.0, 0.7: 0.6})
    after = left_by_recovery(before, BLOCKS)
    for group, of in before.items():
        assert after[group][0.4] / after[group][0.7] == pytest.approx(of[0.4] / of[0.7])


def test_nothing_is_left_where_nothing_was_lost():
    zero = costs({0.5: 0.0}, {0.5: 0.0}, {0.5: 0.0})
    assert left_by_recovery(zero, BLOCKS) == zero


def test_the_groups_of_a_single_block_keep_their_costs():
    one = {"model.layers.1.mlp.down_proj": {0.5: 0.2}}
    assert left_by_recovery(one, BLOCKS[:1]) == one
