"""Draw the trade-off curve of a plan: the size of some choices, and their loss.

Each loss is predicted, as the sum of the groups' costs, and measured, with all groups
pruned together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc_attnmask.oneshot.sensitivity import Sensitivity
from llmc_attnmask.oneshot.trade_off import Budget, Costs, Sparsities, TradeOff

# shares of the weights, dense or pruned, of the points of the curve
_DENSE_SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)
_SPARSITIES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
# The log loss of a trained model rises by less than the divergence, but a rise that is
# measured on few tokens is not trusted to be much less.
_LEAST_RISE = 0.25


@dataclass(frozen=True)
class Point:
    """One choice: a point of the trade-off between size and loss."""

    sparsities: Mapping[str, float] = field(repr=False)  # group -> sparsity; 0 is dense
    size: float  # bytes of the weights, packed, over those of the dense ones
    dense_share: float  # of the weights
    sparsity: float  # of all weights
    # KL divergence to the dense model, in nats per token
    predicted: float  # the sum of the groups' costs
    measured: float  # of all groups pruned together
    weighed: float  # the sum of the costs as they were weighed for the choice
    rise: float  # of the log loss, with all groups pruned together
    # rise of the perplexity that is expected once the recipe has run, 0.05 for 5 %
    expected: float = math.nan


def choices_of(trade_off: TradeOff, costs: Costs) -> list[Sparsities]:
    """Return the best choices at the sizes of the curve."""
    if trade_off.structure.unstructured:
        budgets = [Budget("sparsity", share) for share in _SPARSITIES]
    else:
        budgets = [Budget("dense_share", share) for share in _DENSE_SHARES]
    return [trade_off.choose(budget, costs) for budget in budgets]


def points(
    sensitivity: Sensitivity,
    trade_off: TradeOff,
    costs: Costs,
    weighed: Costs,
    choices: Sequence[Sparsities],
) -> list[Point]:
    """Return the points of some choices; all are measured in one pass.

    :param weighed: the costs as they were weighed for the choice
    """
    losses = sensitivity.together(choices)
    return [
        Point(
            sparsities,
            trade_off.size(sparsities),
            trade_off.dense_share(sparsities),
            trade_off.sparsity(sparsities),
            trade_off.total(costs, sparsities),
            loss.kl,
            trade_off.total(weighed, sparsities),
            loss.rise,
        )
        for sparsities, loss in zip(choices, losses, strict=True)
    ]


def expectation(curve: Sequence[Point], left: float) -> Callable[[float], float]:
    """Return a function from the sum of weighed costs to the rise of the perplexity.

    Together, groups cost about the sum of their costs; by how much they differ is
    taken from the curve. How much the log loss rises with the divergence is taken from
    the point that loses most, where noise matters least.

    :param left: share of SparseGPT's loss that the recipe leaves
    """
    most = max(curve, key=lambda point: point.measured)
    if most.measured > 0:
        left *= min(max(most.rise / most.measured, _LEAST_RISE), 1.0)
    by_loss = sorted(
        (p.weighed, p.measured / p.predicted) for p in curve if p.predicted > 0
    )
    sums = [weighed for weighed, _ in by_loss] or [1.0]
    ratios = [ratio for _, ratio in by_loss] or [1.0]

    def expected(weighed: float) -> float:
        return math.expm1(left * float(np.interp(weighed, sums, ratios)) * weighed)

    return expected
