import math

import pytest

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.trade_off import Budget, TradeOff, check_budget, packed_size

ENTRIES = {"a": 100, "b": 100, "c": 200}


def two_of_four() -> tuple[TradeOff, dict]:
    costs = {"a": {0.5: 0.3}, "b": {0.5: 0.1}, "c": {0.5: 0.2}}
    return TradeOff(ENTRIES, MaskStructure.parse("2:4")), costs


def unstructured() -> tuple[TradeOff, dict]:
    costs = {
        group: {s: c * math.exp(7 * s) for s in (0.4, 0.7)}
        for group, c in {"a": 0.1, "b": 0.01, "c": 0.01}.items()
    }
    return TradeOff(ENTRIES, MaskStructure.parse("0:0")), costs


def test_the_groups_that_cost_most_for_their_weights_stay_dense():
    trade_off, costs = two_of_four()
    chosen = trade_off.choose(Budget("dense_share", 0.25), costs)
    assert chosen == {"a": 0.0, "b": 0.5, "c": 0.5}
    assert trade_off.dense_share(chosen) == 0.25
    assert trade_off.sparsity(chosen) == 0.375
    assert trade_off.size(chosen) == 0.25 + 0.75 * 0.5625
    assert trade_off.total(costs, chosen) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "budget",
    [Budget("dense_share", 0.25), Budget("sparsity", 0.375), Budget("size", 0.68)],
)
def test_budgets_of_every_kind_that_mean_the_same_give_the_same(budget):
    trade_off, costs = two_of_four()
    assert trade_off.choose(budget, costs) == {"a": 0.0, "b": 0.5, "c": 0.5}


def test_unstructured_groups_get_less_sparsity_the_more_they_cost():
    trade_off, costs = unstructured()
    chosen = trade_off.choose(Budget("sparsity", 0.6), costs)
    assert 0.6 <= trade_off.sparsity(chosen) <= 0.65
    assert chosen["a"] < chosen["b"]
    uniform = dict.fromkeys(ENTRIES, 0.6)
    assert trade_off.total(costs, chosen) < trade_off.total(costs, uniform)


def test_costs_from_the_lowest_measured_sparsity_on_are_exponential():
    trade_off, costs = unstructured()
    for sparsity in (0.4, 0.5, 0.6, 0.7, 0.8):
        expected = 0.1 * math.exp(7 * sparsity)
        assert trade_off.cost(costs["a"], sparsity) == pytest.approx(expected)


def test_costs_below_the_lowest_measured_sparsity_fall_to_nothing():
    trade_off, costs = unstructured()
    lowest = 0.1 * math.exp(7 * 0.4)
    power = 7 * 0.4  # both laws have the same slope where they meet
    for sparsity in (0.3, 0.1, 0.001):
        expected = lowest * (sparsity / 0.4) ** power
        assert trade_off.cost(costs["a"], sparsity) == pytest.approx(expected)
    assert trade_off.cost(costs["a"], 0.0) == 0.0


def test_a_cost_that_falls_by_noise_is_no_higher_at_low_sparsities():
    trade_off, _ = unstructured()
    for sparsity in (0.1, 0.5, 0.8):
        assert trade_off.cost({0.4: 1e-3, 0.7: 0.0}, sparsity) == pytest.approx(1e-3)


def test_the_smallest_size_within_a_loss_is_found():
    trade_off, costs = two_of_four()
    chosen = trade_off.smallest(0.35, costs, lambda predicted: predicted)
    assert chosen == {"a": 0.0, "b": 0.5, "c": 0.5}
    # a dear group does not keep a cheap one from being pruned
    cheap = trade_off.smallest(0.11, costs, lambda predicted: predicted)
    assert cheap == {"a": 0.0, "b": 0.5, "c": 0.0}
    everything = trade_off.smallest(10.0, costs, lambda predicted: predicted)
    assert set(everything.values()) == {0.5}


def test_a_loss_that_leaves_nothing_to_prune_is_refused_with_the_least():
    trade_off, costs = two_of_four()
    with pytest.raises(ValueError, match=r"costs least already costs 0\.1"):
        trade_off.smallest(0.05, costs, lambda predicted: predicted)


@pytest.mark.parametrize(
    ("structure", "budget", "message"),
    [
        ("2:4", Budget("size", 0.5), r"between 0\.5625 and 1"),
        ("2:4", Budget("sparsity", 0.6), r"between 0 and 0\.5"),
        ("2:4", Budget("dense_share", 1.2), "between 0 and 1"),
        ("0:0", Budget("sparsity", 0.9), r"between 0 and 0\.8"),
        ("0:0", Budget("dense_share", 0.2), "give sparsity, size or loss"),
        ("2:4", Budget("loss", 0.0), "more than 0"),
        ("2:4", Budget("loss", math.nan), "more than 0"),
        ("2:4", Budget("size", math.nan), "cannot be met"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(
    structure, budget, message
):
    with pytest.raises(ValueError, match=message):
        check_budget(budget, MaskStructure.parse(structure))


def test_a_packed_weight_takes_its_value_and_a_bit():
    assert packed_size(0.5) == 0.5625
    assert packed_size(0.0) == 1.0
