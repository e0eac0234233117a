"""Weigh what groups cost by the depth of their block.

A block's recovery makes good errors of the blocks before it, too, so more is left of
what is lost late. By how much depends on the model and the recipe, and is not measured.
Weights that rise threefold are a compromise of three models (docs/planning.md).
"""

from collections.abc import Collection, Mapping
from statistics import fmean

from llmc_attnmask.oneshot.trade_off import Costs

_LAST = 3.0  # weight of the last block's costs over that of the first block's


def weighed_by_depth(costs: Costs, blocks: Mapping[str, Collection[str]]) -> Costs:
    """Return the costs, those of early blocks lowered and those of late ones raised.

    The sum of all groups' costs stays what it is, on average over the sparsities.

    :param costs: group -> sparsity -> nats per token, of the same sparsities
    :param blocks: the model's blocks in order -> their groups
    """
    last = max(len(blocks) - 1, 1)
    weights = {
        group: _LAST ** (position / last)
        for position, groups in enumerate(blocks.values())
        for group in groups
    }
    sums = {s: sum(of[s] for of in costs.values()) for s in next(iter(costs.values()))}
    means = [
        sum(weights[group] * of[s] for group, of in costs.items()) / total
        for s, total in sums.items()
        if total
    ]
    scale = fmean(means) if means else 1.0
    return {
        group: {s: weights[group] * cost / scale for s, cost in of.items()}
        for group, of in costs.items()
    }
