import math

import pytest

from llmc_attnmask.oneshot.curve import Point, expectation


def point(
    predicted: float, measured: float, rise: float, weighed: float | None = None
) -> Point:
    weighed = predicted if weighed is None else weighed
    return Point({}, 0.6, 0.1, 0.4, predicted, measured, weighed, rise)


def test_the_perplexity_rises_by_the_loss_that_the_recipe_leaves():
    expected = expectation([point(1.0, 1.0, 1.0), point(0.1, 0.1, 0.1)], left=0.5)
    assert expected(0.4) == pytest.approx(math.expm1(0.2))
    assert expected(0.0) == 0.0


def test_costs_that_do_not_add_up_are_corrected_by_the_curve():
    expected = expectation([point(1.0, 0.8, 0.8), point(2.0, 1.2, 1.2)], left=1.0)
    assert expected(1.0) == pytest.approx(math.expm1(0.8))
    assert expected(1.5) == pytest.approx(math.expm1(1.5 * 0.7))  # between .8 and .6


def test_the_correction_is_that_of_choices_with_the_same_weighed_costs():
    curve = [point(1.0, 0.8, 0.8, weighed=0.9), point(2.0, 1.2, 1.2, weighed=1.8)]
    expected = expectation(curve, left=1.0)
    assert expected(0.9) == pytest.approx(math.expm1(0.9 * 0.8))
    assert expected(1.8) == pytest.approx(math.expm1(1.8 * 0.6))


@pytest.mark.parametrize(
    ("rise", "counted"), [(0.7, 0.7), (0.1, 0.25), (-0.2, 0.25), (1.4, 1.0)]
)
def test_the_log_loss_rises_by_a_quarter_of_the_divergence_to_all_of_it(rise, counted):
    curve = [point(1.0, 1.0, rise), point(0.1, 0.1, 0.09)]  # the largest loss decides
    assert expectation(curve, left=1.0)(1.0) == pytest.approx(math.expm1(counted))
