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
    seed: int  # sets the order of the samples


class Derivative(NamedTuple):
    """A loss and its gradients at some tensors, which depend on the learned ones."""

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
    """Minimize a loss with Adam, in place, with learning rates that decay as a cosine.

    A loss or gradient that is not finite ends the descent before its step is taken.

    :param learned: tensors to move, dense in memory, each with its peak learning rate
    :param micro_batches: those of all ranks, from which mini-batches are drawn
    :param differentiate: (mini-batch, progress in [0, 1)) -> the loss and its gradients
    :param after_step: (step, loss) -> whether to stop; called after each step
    :return: the step and what was not finite in it; None if everything was finite
    """
    optimizer = torch.optim.Adam(
        [
            {"params": [tensor.requires_grad_()], "peak": peak}
            for tensor, peak in learned
        ],
        fused=True,
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
        torch.autograd.backward(at, gradients)
        optimizer.step()
        optimizer.zero_grad()
        del at, gradients  # not in memory beside the next step's
        if after_step is not None and after_step(step, loss):
            break
    return None


def mean_gradient(
    loss_of: Callable[[list[int]], Tensor],
    weights: Mapping[Key, Tensor],
    micro_batches: Sequence[MicroBatch],
    runner: MicroBatchRunner,
    unused: bool = False,
) -> tuple[float, dict[Key, Tensor]]:
    """Return the mean loss over the samples of all ranks, and its gradients.

    Each rank evaluates its own micro-batches.

    :param loss_of: indices of samples -> the sum of their losses
    :param weights: leaves of autograd
    :param unused: whether a loss may not depend on some of them, such as the weights
        of experts without tokens, which then have a gradient of zero
    """
    leaves = list(weights.values())

    def run(samples: list[int]) -> tuple[float, tuple[Tensor, ...]]:
        with torch.enable_grad():
            loss = loss_of(samples)
        found = torch.autograd.grad(loss, leaves, materialize_grads=unused)
        return loss.item(), found

    total, sums = 0.0, Sums(like=weights)
    for _, (loss, gradients) in runner(micro_batches, run):
        total += loss
        for key, gradient in zip(weights, gradients, strict=True):
            sums.add(key, gradient)
    number = sample_count(micro_batches)
    mean = all_sum_numbers(total)[0] / number
    return mean, {key: term / number for key, term in sums.totals().items()}


def non_finite(loss: float, gradients: Iterable[Tensor]) -> str | None:
    """Describe what is not finite in a loss and its gradients; None if all is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    # a finite sum, which is cheaper, has only finite terms
    suspicious = [g for g in gradients if not g.sum().isfinite()]
    if bad := sum(int((~gradient.isfinite()).sum()) for gradient in suspicious):
        return f"{bad} entries of the gradient are not finite"
    return None
