"""Refine the surviving weights of a whole block by gradient steps, with fixed masks.

    min over surviving weights of  mean over tokens of ||y~_t - y_t||_w^2 / ||y_t||_w^2
                                   + attention_weight * ||A~ - A||_F^2 / ||A||_F^2

Y~ is the pruned block's output on the pruned model's hidden states, and Y the dense
block's output on the dense model's hidden states. So the block also compensates for
its predecessors. A and A~ are the attention matrices inside the two blocks;
``error.py`` explains the norms.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import attention_modules
from llmc_attnmask.calibration.micro_batches import MicroBatch, micro_batches_of
from llmc_attnmask.recovery.block import Block, BlockPair
from llmc_attnmask.recovery.error import OutputError
from llmc_attnmask.solvers.descent import (
    Derivative,
    DescentSettings,
    descend,
    mean_gradient,
)


@dataclass(frozen=True)
class RefineSettings(DescentSettings):
    """How the surviving weights move; the modifier documents the fields."""

    learning_rate: float
    attention_weight: float


@dataclass(frozen=True)
class Refinement:
    """The result of a descent."""

    errors: list[float]  # of the block before and after, see ``OutputError``
    fallback: str | None = None  # what was not finite, if anything


@torch.no_grad()
def refine(pair: BlockPair, settings: RefineSettings, name: str) -> Refinement:
    """Move the surviving weights of ``pair.pruned``; restore them if the error rises.

    :param name: of the block, for messages
    """
    output_error = OutputError(pair)
    start = output_error.mean()
    before = pair.weights()
    dense, pruned = pair.dense.linears(), pair.pruned.linears()
    learned = [
        (pruned[name].weight, settings.learning_rate * dense[name].weight.std().item())
        for name in pair.kept
    ]
    micro_batches = micro_batches_of(pair.pruned.inputs, settings.batch_size)
    objective = _Objective(output_error, settings.attention_weight)
    fallback = descend(learned, micro_batches, objective.differentiate, settings)
    error = math.nan if fallback else output_error.mean()
    if not fallback and not math.isfinite(error):
        fallback = f"the error after the descent is {error}"
    for weight, _ in learned:
        weight.requires_grad_(False)
    if not error <= start:  # also if it is NaN
        pair.restore(before)
        error = start
    if fallback:
        logger.warning(f"{name}: {fallback}; the block stays as it was pruned")
    return Refinement([start, error], fallback)


class _Objective:
    """The loss above as a function of the pruned block's current weights."""

    def __init__(self, output_error: OutputError, attention_weight: float):
        self.output_error, self.pair = output_error, output_error.pair
        self.attention_weight = attention_weight
        weighed = bool(attention_weight)
        self.attention = _AttentionTerm(self.pair) if weighed else None

    def differentiate(self, batch: list[MicroBatch], progress: float) -> Derivative:
        """Return the mean loss over a mini-batch's samples, on all ranks."""
        linears = self.pair.pruned.linears()
        kept = self.pair.kept
        weights = {name: linears[name].weight for name in kept}
        loss, gradients = mean_gradient(
            self._loss, weights, batch, self.pair.pruned.runner, unused=True
        )
        # on a CPU, a product takes a tenth of the time of masked_fill
        survivors = [gradients[name].mul_(mask) for name, mask in kept.items()]
        return Derivative(loss, list(weights.values()), survivors)

    def _loss(self, samples: list[int]) -> Tensor:
        """Return the sum of some samples' losses."""
        loss = self.output_error.of(samples).sum()
        if self.attention is not None:
            relative = self.attention(samples) * len(samples)
            loss = loss + self.attention_weight * relative
        return loss


class _AttentionTerm:
    """The relative error of the attention matrices inside two blocks, per sample.

    Call it after the pruned block has run on the same samples: it uses the arguments
    that the attention modules had in that run.
    """

    def __init__(self, pair: BlockPair):
        self.dense, self.pruned = dense, pruned = pair.dense, pair.pruned
        self.replicas = {
            name: AttentionReplica(attention)
            for name, attention in attention_modules(dense.module).items()
        }
        self.dense_inputs = self._watched(dense)
        self.pruned_inputs = self._watched(pruned)

    def _watched(self, block: Block) -> dict[str, tuple[Any, Any]]:
        """Return a dictionary that each run fills with attention modules' arguments."""
        seen: dict[str, tuple[Any, Any]] = {}

        def hook(name: str) -> Any:
            return lambda _, args, kwargs: seen.update({name: (args, kwargs)})

        for name in self.replicas:
            attention = block.module.get_submodule(name)
            attention.register_forward_pre_hook(hook(name), with_kwargs=True)
        return seen

    def __call__(self, samples: list[int]) -> Tensor:
        total = torch.zeros((), device=self.pruned.device)
        with torch.no_grad():
            self.dense(samples)
        for name, replica in self.replicas.items():
            weights = self.pruned.module.get_submodule(name).named_parameters()
            args, kwargs = _in_float32(self.dense_inputs[name])
            with torch.no_grad():
                reference = replica(args, kwargs)
            args, kwargs = _in_float32(self.pruned_inputs[name])
            call = replica(args, kwargs, dict(weights))
            error = attention_error(reference, call.query, call.key)
            total = total + error / attention_norms(reference).matrix
        return total


def _in_float32(arguments: Any) -> Any:
    def to(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, to, arguments)
