"""Recover a pruned block: solve for its survivors, then refine them together."""

import math
from dataclasses import dataclass

import torch
from loguru import logger

from llmc_attnmask.recovery.block import BlockPair, block_error
from llmc_attnmask.recovery.refine import RefineSettings, refine
from llmc_attnmask.recovery.refit import refit


@dataclass(frozen=True)
class Recovery:
    """The errors of a block's output before and after each stage."""

    errors: list[float]  # ||Y~ - Y||_F^2 / ||Y - X||_F^2 over all samples
    fallback: str | None = None  # what was not finite, if anything


@torch.no_grad()
def recover(pair: BlockPair, settings: RefineSettings, name: str) -> Recovery:
    """Change the surviving weights of ``pair.pruned``; the masks stay.

    :param settings: with no steps, the least-squares solution is the result
    :param name: of the block, for messages
    """
    linears = pair.pruned.linears()
    errors = [block_error(pair.pruned, pair.targets)]
    before = {child: linears[child].weight.clone() for child in pair.kept}
    refit(pair.dense, pair.pruned, dict(pair.kept))
    errors.append(block_error(pair.pruned, pair.targets))
    fallback: str | None = None
    if not math.isfinite(errors[-1]):
        fallback = f"the error after the least-squares solution is {errors[-1]}"
        logger.warning(f"{name}: {fallback}; the block stays as it was pruned")
        for child, weight in before.items():
            linears[child].weight.copy_(weight)
        errors[-1] = errors[0]
    if settings.steps and not fallback:
        found = refine(pair, errors[-1], settings)
        errors.append(found.error)
        fallback = found.fallback
    return Recovery([error / pair.squared_norm for error in errors], fallback)
