"""Weigh what groups cost by how much of it recovery leaves.

A block's recovery makes good errors of the blocks before it, too, so more is left of
what is lost late. By how much depends on the model and the recipe, and is not measured;
three models agreed on text that calibration leaves out. With weights that rise
threefold from the first block to the last, plans left less than with equal ones.
"""

from collections.abc import Sequence
from statistics import fmean

from llmc_attnmask.oneshot.trade_off import Costs

_LATE = 3.0  # weight of the last block's costs over that of the first block's


def left_by_recovery(costs: Costs, blocks: Sequence[str]) -> Costs:
    """Return the costs, those of early blocks less and those of late ones more.

    With everything pruned, their sum stays what it is.

    :param costs: group -> sparsity -> nats per token
    :param blocks: names of the model's blocks in order, which begin those of groups
    """
    last = max(len(blocks) - 1, 1)
    weights = {
        group: _LATE ** (position / last)
        for position, block in enumerate(blocks)
        for group in costs
        if group.startswith(f"{block}.")
    }
    levels = list(next(iter(costs.values())))
    sums = {s: sum(of[s] for of in costs.values()) for s in levels}
    scale = fmean(
        sum(weights[g] * of[s] for g, of in costs.items()) / sums[s] if sums[s] else 1.0
        for s in levels
    )
    return {
        group: {s: weights[group] * cost / scale for s, cost in of.items()}
        for group, of in costs.items()
    }
