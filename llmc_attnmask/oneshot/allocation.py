"""Choose what each group of weights becomes, for the least loss at given bytes.

Each group has several options with a size and a cost, and exactly one is taken: the
multiple-choice knapsack problem. Starting from the smallest options, the step that
lowers the cost most per byte is taken while it fits, along each group's convex hull.
This solves the problem's linear relaxation, so the loss is at most one step's worth
above the optimum (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, section 11.2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """What a group may become."""

    sparsity: float  # share of its entries that are pruned
    bytes: float
    cost: float  # loss in nats per token


Options = Mapping[str, Sequence[Option]]
Choice = dict[str, Option]


def allocate(options: Options, most: float) -> Choice:
    """Return the option of each group.

    :param options: group -> what it may become, in any order
    :param most: bytes of all groups together
    :raises ValueError: if even the smallest options are larger
    """
    hulls = {group: _hull(each) for group, each in options.items()}
    place = dict.fromkeys(hulls, 0)
    room = most - sum(hull[0].bytes for hull in hulls.values())
    if room < -0.5:
        least = most - room
        raise ValueError(f"at least {least:.0f} bytes are needed; {most:.0f} are given")
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
        extra = hull[position].bytes - hull[position - 1].bytes
        if extra <= room + 0.5:
            place[group] = position
            room -= extra
    return {group: hulls[group][position] for group, position in place.items()}


def _gain(small: Option, large: Option) -> float:
    """Return by how much the cost falls per byte."""
    return (small.cost - large.cost) / (large.bytes - small.bytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options that are on the lower convex hull of cost over bytes."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue  # larger and no better
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
