"""Choose each group's sparsity by measured costs, for a budget of bytes or of loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.oneshot.allocation import Option, allocate

BudgetKind = Literal["dense_share", "sparsity", "size", "loss"]
Sparsities = Mapping[str, float]  # group -> share of its weights to prune; 0 is dense
Costs = Mapping[str, Mapping[float, float]]  # group -> sparsity -> nats per token

# Unstructured groups are measured at two sparsities. From the lower one on, the cost's
# logarithm is linear in the sparsity. Below, it is linear in the sparsity's logarithm,
# with the same slope where both meet: nothing pruned costs nothing. On SmolLM2-135M,
# single groups are off by 9 % at 0.5, 13 % at 0.3 and 35 % at 0.2 in either direction,
# and the sum of all by 10 % at most. What is measured at 0.1 is mostly the rounding of
# bfloat16.
_MEASURED = (0.4, 0.7)
_UNSTRUCTURED = tuple(x / 20 for x in range(2, 17))  # 0.1 to 0.8
BITMASK = 1 / 16  # bytes of a weight's bit over those of a weight in 16 bits
_TINY = 1e-9  # nats; the logarithm of a cost must be finite


@dataclass(frozen=True)
class Budget:
    """What a plan must keep to.

    ``dense_share`` is the share of the weights that stay dense; ``sparsity`` the share
    of all weights that is pruned; ``size`` the bytes of the weights, packed, over those
    of the dense ones in 16 bits; ``loss`` the rise of the perplexity, 0.05 for 5 %.
    """

    kind: BudgetKind
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"

    def weight(self, sparsity: float) -> float:
        """Return what a weight of a group with this sparsity takes of the budget."""
        if self.kind == "dense_share":
            return float(sparsity == 0)
        return 1 - sparsity if self.kind == "sparsity" else packed_size(sparsity)

    @property
    def limit(self) -> float:
        """What an average weight may take of the budget."""
        return 1 - self.value if self.kind == "sparsity" else self.value


def check_budget(budget: Budget, structure: MaskStructure) -> None:
    """Refuse a budget that no choice keeps to.

    :raises ValueError: saying which budgets can be met
    """
    if budget.kind == "loss":
        if not 0 < budget.value < math.inf:
            raise ValueError(
                f"loss is {budget.value:g}; expected the rise of the perplexity that "
                "is allowed, more than 0, such as 0.05 for 5 %"
            )
        return
    if budget.kind == "dense_share" and structure.unstructured:
        raise ValueError(
            "dense_share is for N:M sparsity, where a group is sparse or dense, and "
            "this recipe is unstructured; give sparsity, size or loss"
        )
    sparsities = sparsities_of(structure)
    low, high = {
        "dense_share": (0.0, 1.0),
        "sparsity": (0.0, max(sparsities)),
        "size": (min(map(packed_size, sparsities)), 1.0),
    }[budget.kind]
    if not low <= budget.value <= high:
        raise ValueError(
            f"{budget.kind} is {budget.value:g}, which cannot be met; with "
            f'mask_structure "{structure}" it is between {low:g} and {high:g}'
        )
    if budget.value == (low if budget.kind == "sparsity" else high):
        raise ValueError(f"{budget} leaves nothing to prune; prune more")


def sparsities_of(structure: MaskStructure) -> tuple[float, ...]:
    """Return the sparsities that a group may have, besides 0."""
    if structure.unstructured:
        return _UNSTRUCTURED
    return (structure.pruned / structure.group,)


class TradeOff:
    """The groups of a model, and what they may become.

    :param entries: group -> number of weights
    :param structure: mask structure of everything that is pruned
    """

    def __init__(self, entries: Mapping[str, int], structure: MaskStructure):
        self.entries, self.structure = dict(entries), structure
        self._total = sum(entries.values())
        self.sparsities = sparsities_of(structure)
        self.measured = _MEASURED if structure.unstructured else self.sparsities
        """Sparsities at which costs are needed."""

    def choose(self, budget: Budget, costs: Costs) -> dict[str, float]:
        """Return the sparsities of least cost within a budget of weights or bytes.

        :raises ValueError: if nothing would be pruned
        """
        options = self._options(costs, budget.weight)
        found = allocate(options, budget.limit * self._total)
        chosen = {group: option.sparsity for group, option in found.items()}
        if not any(chosen.values()):
            raise ValueError(f"{budget} leaves nothing to prune; prune more")
        return chosen

    def smallest(
        self, most: float, costs: Costs, loss: Callable[[float], float]
    ) -> dict[str, float]:
        """Return the sparsities of least size whose loss is at most ``most``.

        :param loss: turns the sum of the groups' costs into the loss, and rises with it
        :raises ValueError: if nothing can be pruned
        """
        # the same problem, with what a group costs and what it takes interchanged
        options = {
            group: [Option(o.sparsity, weight=o.cost, cost=o.weight) for o in each]
            for group, each in self._options(costs, packed_size).items()
        }
        largest = sum(max(o.weight for o in each) for each in options.values())
        limit = _bisected(0.0, largest, lambda total: loss(total) <= most)
        found = allocate(options, limit)
        chosen = {group: option.sparsity for group, option in found.items()}
        if not any(chosen.values()):
            least = min(self.cost(c, min(self.sparsities)) for c in costs.values())
            raise ValueError(
                f"loss is {most:g}, which leaves nothing to prune; the group that "
                f"costs least already costs {loss(least):.2g}"
            )
        return chosen

    def _options(
        self, costs: Costs, weight: Callable[[float], float]
    ) -> dict[str, list[Option]]:
        """Return what each group may become.

        :param weight: what a weight of a group takes of the budget, by sparsity
        """
        return {
            group: [
                Option(s, count * weight(s), self.cost(costs[group], s))
                for s in (0.0, *self.sparsities)
            ]
            for group, count in self.entries.items()
        }

    def cost(self, measured: Mapping[float, float], sparsity: float) -> float:
        """Return a group's cost at any sparsity, in nats per token."""
        if sparsity == 0:
            return 0.0
        if sparsity in measured:
            return measured[sparsity]
        (low, first), (high, last) = sorted(measured.items())
        first, last = math.log(max(first, _TINY)), math.log(max(last, _TINY))
        slope = max((last - first) / (high - low), 0.0)  # it falls by noise only
        if sparsity < low:
            return math.exp(first + slope * low * math.log(sparsity / low))
        return math.exp(first + slope * (sparsity - low))

    def total(self, costs: Costs, chosen: Sparsities) -> float:
        """Return the sum of the groups' costs, in nats per token."""
        return sum(self.cost(costs[g], s) for g, s in chosen.items())

    def size(self, chosen: Sparsities) -> float:
        """Return the bytes of the weights, packed, over those of the dense ones."""
        return self._mean(chosen, packed_size)

    def sparsity(self, chosen: Sparsities) -> float:
        """Return the share of all weights that is pruned."""
        return self._mean(chosen, lambda s: s)

    def dense_share(self, chosen: Sparsities) -> float:
        """Return the share of all weights that stays dense."""
        return self._mean(chosen, lambda s: float(s == 0))

    def _mean(self, chosen: Sparsities, of: Callable[[float], float]) -> float:
        return sum(self.entries[g] * of(s) for g, s in chosen.items()) / self._total


def _bisected(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """Return the largest number at which something holds that holds up to there."""
    if holds(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def packed_size(sparsity: float) -> float:
    """Return bytes of weights in 16 bits, packed with a bit mask, over the dense ones.

    Dense weights are not packed. At 2:4 it is 0.5625.
    """
    return 1 - sparsity + BITMASK if sparsity else 1.0
