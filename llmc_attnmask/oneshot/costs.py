"""Measure what every group of a model costs, and keep it from one run to the next."""

from collections.abc import Collection, Sequence

from tqdm import tqdm

from llmc_attnmask.oneshot.sensitivity import BlockCosts, Sensitivity
from llmc_attnmask.oneshot.trade_off import Costs
from llmc_attnmask.runlog.progress import Progress

COSTS = "costs "  # begins the names of blocks' costs in the progress


def measured_costs(
    sensitivity: Sensitivity, levels: Sequence[float], progress: Progress | None
) -> Costs:
    """Measure every group, block by block; blocks of an earlier run are read.

    :param levels: sparsities
    """
    blocks = sensitivity.blocks
    known: dict[str, BlockCosts] = {}
    if progress is not None:
        for block, groups in sensitivity.groups.items():
            if costs := _kept(progress, block, groups, levels):
                known[block] = costs
    found = sensitivity.costs(levels, known)
    all_costs: BlockCosts = {}
    for block, of in tqdm(found, desc="sensitivity", total=len(blocks), unit="block"):
        if progress is not None and block not in known:
            progress.save_data(COSTS + block, of)
        all_costs |= of
    return all_costs


def _kept(
    progress: Progress, block: str, groups: Collection[str], levels: Collection[float]
) -> BlockCosts:
    """Return the costs of a block that an earlier run has kept.

    :return: nothing if another version has measured other groups or sparsities
    """
    kept = progress.read_data(COSTS + block) or {}
    costs = {
        group: {float(level): cost for level, cost in of.items()}
        for group, of in kept.items()
    }
    complete = costs.keys() == set(groups)
    same = all(of.keys() == set(levels) for of in costs.values())
    return costs if complete and same else {}
