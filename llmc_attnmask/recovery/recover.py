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

    errors: list[float]  # see ``block_error``
    fallback: str | None = None  # what was not finite, if anything


@torch.no_grad()
def recover(pair: BlockPair, settings: RefineSettings, name: str) -> Recovery:
    """Change the surviving weights of ``pair.pruned``; the masks stay.

    :param settings: with no steps, the least-squares solution is the result
    :param name: of the block, for messages
    """
    errors = [block_error(pair.pruned, pair.targets)]
    error, fallback = _solve(pair, errors[0], name)
    errors.append(error)
    if settings.steps and not fallback:
        found = refine(pair, error, settings)
        errors.append(found.error)
        fallback = found.fallback
    return Recovery(errors, fallback)


def _solve(pair: BlockPair, start_error: float, name: str) -> tuple[float, str | None]:
    """Solve for the survivors; if the error is not finite, restore them.

    :return: the block's error, and what was not finite, if anything
    """
    before = pair.weights()
    refit(pair)
    error = block_error(pair.pruned, pair.targets)
    if math.isfinite(error):
        return error, None
    fallback = f"the error after the least-squares solution is {error}"
    logger.warning(f"{name}: {fallback}; the block stays as it was pruned")
    pair.restore(before)
    return start_error, fallback
