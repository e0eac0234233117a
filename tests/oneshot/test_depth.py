import pytest

from llmc_attnmask.oneshot.depth import weighed_by_depth

BLOCKS = {f"layers.{i}": [f"layers.{i}.mlp.down_proj"] for i in (1, 2, 10)}


def costs(*of: dict[float, float]) -> dict:
    return {group: each for (group,), each in zip(BLOCKS.values(), of, strict=True)}


def test_the_last_block_weighs_three_times_as_much_as_the_first():
    found = weighed_by_depth(costs({0.5: 1.0}, {0.5: 1.0}, {0.5: 1.0}), BLOCKS)
    first, middle, last = (of[0.5] for of in found.values())
    assert last / first == pytest.approx(3)
    assert middle / first == pytest.approx(3**0.5)


def test_the_sum_of_all_groups_stays():
    found = weighed_by_depth(costs({0.5: 0.1}, {0.5: 0.5}, {0.5: 0.3}), BLOCKS)
    assert sum(of[0.5] for of in found.values()) == pytest.approx(0.9)


def test_of_several_sparsities_it_stays_on_average():
    before = costs({0.4: 0.0, 0.7: 0.9}, {0.4: 0.1, 0.7: 0.5}, {0.4: 0.3, 0.7: 0.2})
    after = weighed_by_depth(before, BLOCKS)
    ratios = [
        sum(of[s] for of in after.values()) / sum(of[s] for of in before.values())
        for s in (0.4, 0.7)
    ]
    assert ratios[0] > 1 > ratios[1]
    assert sum(ratios) / 2 == pytest.approx(1)


def test_a_groups_costs_keep_their_ratio():
    before = costs({0.4: 0.1, 0.7: 0.4}, {0.4: 0.2, 0.7: 0.3}, {0.4: 0.0, 0.7: 0.6})
    after = weighed_by_depth(before, BLOCKS)
    for group, of in before.items():
        assert after[group][0.4] / after[group][0.7] == pytest.approx(of[0.4] / of[0.7])


def test_groups_that_cost_nothing_still_cost_nothing():
    zero = costs({0.5: 0.0}, {0.5: 0.0}, {0.5: 0.0})
    assert weighed_by_depth(zero, BLOCKS) == zero


def test_the_groups_of_a_single_block_keep_their_costs():
    one = {"layers.1.mlp.down_proj": {0.5: 0.2}}
    assert weighed_by_depth(one, {"layers.1": list(one)}) == one
