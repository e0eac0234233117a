"""Gradient descent with Adam on mini-batches of calibration samples."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from llmc_attnmask.calibration.memory import MicroBatchRunner
from llmc_attnmask.calibration.micro_batches import (
    MicroBatch,
    Sums,
    minibatches,
    sample_count,
)
from llmc_attnmask.distributed import all_sum_numbers

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class DescentSettings:
    """How many steps a descent takes, and on which samples."""

    steps: int
    batch_size: int  # calibration samples per step
    seed: int  # order of the samples


class Derivative(NamedTuple):
    """A loss and its gradients at some tensors, which depend on those that move."""

    loss: float
    at: Sequence[Tensor]
    gradients: Sequence[Tensor]


def descend(
    learned: Iterable[tuple[Tensor, float]],
    micro_batches: Sequence[MicroBatch],
    differentiate: Callable[[list[MicroBatch], float], Derivative],
    settings: DescentSettings,
    after_step: Callable[[int, float], bool] | None = None,
) -> str | None:
    """Move tensors downhill, in place, with step sizes that follow half a cosine.

    :param learned: tensors to move, each with Adam's first step size
    :param micro_batches: those of all ranks to draw the mini-batches from
    :param differentiate: (mini-batch, progress in [0, 1)) -> the mini-batch's loss
    :param after_step: (step, its loss) -> whether to end here
    :return: which step had a loss or gradient that is not finite, and ended the descent
        without moving anything; None if all were finite
    """
    optimizer = torch.optim.Adam(
        [
            {"params": [tensor.requires_grad_()], "peak": peak}
            for tensor, peak in learned
        ]
    )
    generator = torch.Generator().manual_seed(settings.seed)
    batches = minibatches(micro_batches, settings.batch_size, generator)
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        progress = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * progress))
        loss, at, gradients = differentiate(batch, progress)
        if fault := non_finite(loss, gradients):
            return f"step {step}: {fault}"
        optimizer.zero_grad()
        torch.autograd.backward(at, gradients)
        optimizer.step()
        if after_step is not None and after_step(step, loss):
            break
    return None


def mean_gradient(
    loss_of: Callable[[list[int]], Tensor],
    weights: Mapping[Key, Tensor],
    micro_batches: Sequence[MicroBatch],
    runner: MicroBatchRunner,
) -> tuple[float, dict[Key, Tensor]]:
    """Mean loss of the samples of all ranks, and its gradient at each weight.

    Every rank evaluates the micro-batches that it has.

    :param loss_of: sum of some samples' losses
    :param weights: leaves; those that no loss depends on, as of experts without
        tokens, get zeros
    """
    leaves = list(weights.values())

    def run(samples: list[int]) -> tuple[float, tuple[Tensor, ...]]:
        with torch.enable_grad():
            loss = loss_of(samples)
        return loss.item(), torch.autograd.grad(loss, leaves, materialize_grads=True)

    total, sums = 0.0, Sums(like=weights)
    for _, (loss, gradients) in runner(micro_batches, run):
        total += loss
        for key, gradient in zip(weights, gradients, strict=True):
            sums.add(key, gradient)
    number = sample_count(micro_batches)
    mean = all_sum_numbers(total)[0] / number
    return mean, {key: term.div_(number) for key, term in sums.totals().items()}


def non_finite(loss: float, gradients: Iterable[Tensor]) -> str | None:
    """Says what of a loss and its gradient is no finite number; None if all is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if bad := sum(int((~gradient.isfinite()).sum()) for gradient in gradients):
        return f"{bad} entries of the gradient are no finite numbers"
    return None
