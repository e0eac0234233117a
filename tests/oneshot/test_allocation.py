import itertools
import random

import pytest

from llmc_attnmask.oneshot.allocation import Option, allocate


def problem(seed: int) -> dict[str, list[Option]]:
    """Six groups with a convex loss, as pruning has."""
    random.seed(seed)
    options = {}
    for group in "abcdef":
        size, cost = random.randint(50, 200), random.expovariate(1)
        options[group] = [
            Option(s, size * (1 - s), cost * s**3) for s in (0.0, 0.3, 0.5, 0.7, 0.9)
        ]
    return options


def cost(choice) -> float:
    return sum(option.cost for option in choice.values())


def size(choice) -> float:
    return sum(option.weight for option in choice.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_loss_is_at_most_one_step_above_the_best_possible(seed, share):
    options = problem(seed)
    most = share * sum(max(o.weight for o in each) for each in options.values())
    found = allocate(options, most)
    assert size(found) <= most * (1 + 1e-9)
    every = (
        dict(zip(options, choice, strict=True))
        for choice in itertools.product(*options.values())
    )
    best = min(cost(choice) for choice in every if size(choice) <= most * (1 + 1e-9))
    step = max(
        small.cost - large.cost
        for each in options.values()
        for large, small in itertools.pairwise(each)
    )
    assert best <= cost(found) + 1e-12 and cost(found) <= best + step


def test_with_room_for_everything_all_groups_stay_dense():
    found = allocate(problem(0), 1e9)
    assert {option.sparsity for option in found.values()} == {0.0}


def test_a_group_that_does_not_fit_leaves_its_room_to_others():
    options = {
        "large": [Option(0.0, 100, 0.0), Option(0.5, 50, 9.0)],
        "small": [Option(0.0, 10, 0.0), Option(0.5, 5, 0.1)],
    }
    found = allocate(options, 70)
    assert found["large"].sparsity == 0.5 and found["small"].sparsity == 0.0


def test_an_option_that_is_heavier_and_no_better_is_never_taken():
    options = {"a": [Option(0.0, 10, 1.0), Option(0.5, 5, 1.0)]}
    assert allocate(options, 10)["a"].sparsity == 0.5


def test_too_small_a_budget_is_refused_with_what_is_needed():
    options = {"a": [Option(0.0, 10, 0.0), Option(0.5, 5, 1.0)]}
    with pytest.raises(ValueError, match="at least 5 is needed; 4 is given"):
        allocate(options, 4)
