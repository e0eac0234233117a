"""Choose what each group of weights becomes, for the least loss within a budget.

Each group has several options with a weight and a cost, and exactly one is taken: the
multiple-choice knapsack problem. Starting from the lightest options, the step that
lowers the cost most for its weight is taken while it fits, along each group's convex
hull. This solves the problem's linear relaxation, so the cost is at most one step's
worth above the optimum (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, section
11.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """What a group may become."""

    sparsity: float  # share of its entries that are pruned
    weight: float  # what it takes of the budget
    cost: float


Options = Mapping[str, Sequence[Option]]
Choice = dict[str, Option]


def allocate(options: Options, most: float) -> Choice:
    """Return the option of each group.

    :param options: group -> what it may become, in any order
    :param most: weight of all groups together
    :raises ValueError: if even the lightest options are heavier
    """
    hulls = {group: _hull(each) for group, each in options.items()}
    place = dict.fromkeys(hulls, 0)
    least = sum(hull[0].weight for hull in hulls.values())
    rounding = 1e-9 * max(abs(most), least)
    room = most - least + rounding
    if room < 0:
        raise ValueError(f"at least {least:g} is needed; {most:g} is given")
    steps = sorted(
        (
            (_gain(small, large), group, position + 1)
            for group, hull in hulls.items()
            for position, (small, large) in enumerate(pairwise(hull))
        ),
        key=lambda step: -step[0],
    )
    for _, group, position in steps:
        if position != place[group] + 1:
            continue  # the step before it did not fit
        hull = hulls[group]
        extra = hull[position].weight - hull[position - 1].weight
        if extra <= room:
            place[group] = position
            room -= extra
    return {group: hulls[group][position] for group, position in place.items()}


def _gain(small: Option, large: Option) -> float:
    """Return by how much the cost falls per weight."""
    return (small.cost - large.cost) / (large.weight - small.weight)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options that are on the lower convex hull of cost over weight."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.weight, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue  # heavier and no better
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
