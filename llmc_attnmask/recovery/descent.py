"""Gradient steps on the survivors of a whole block, masks fixed.

    min over survivors of  ||Y~ - Y||_F^2 / ||Y - X||_F^2
                           + attention_weight * ||A~ - A||_F^2 / ||A||_F^2

Y~ is the pruned block's output on the pruned model's hidden states, Y the dense
block's on the dense model's X, so the block also makes up for what its predecessors
lost; A and A~ are the attention matrices within.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import attention_modules
from llmc_attnmask.recovery.block import Block, block_error


@dataclass(frozen=True)
class DescentSettings:
    """How survivors move; see the modifier for the meaning."""

    steps: int
    learning_rate: float
    batch_size: int
    attention_weight: float
    seed: int


def descend(
    dense: Block,
    pruned: Block,
    wanted: Sequence[Tensor],
    start_error: float,
    energy: float,
    kept: dict[str, Tensor],
    settings: DescentSettings,
) -> float:
    """Move the survivors of ``pruned``; unless that lowers the error, put them back.

    :param start_error: ||Y~ - Y||_F^2 over all samples as it is
    :param wanted: Y of every sample, [1, L, D]
    :param energy: ||Y - X||_F^2 over all samples
    :param kept: name of a Linear of the block -> bool [rows, columns]
    :return: ||Y~ - Y||_F^2 over all samples as it is now
    """
    linears = {name: pruned.linears()[name] for name in kept}
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    groups = []
    for name, linear in linears.items():
        linear.weight.requires_grad_(True)
        spread = dense.linears()[name].weight.std().item()
        peak = settings.learning_rate * spread
        groups.append({"params": [linear.weight], "peak": peak})
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(settings.seed)
    samples = range(len(pruned.inputs))
    batches = pruned.inputs.minibatches(samples, settings.batch_size, generator)
    attention = _AttentionTerm(dense, pruned) if settings.attention_weight else None
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        for group in optimizer.param_groups:
            share = step / settings.steps
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * share))
        target = torch.cat([wanted[i] for i in batch]).to(pruned.device)
        with torch.enable_grad():
            lost = (pruned(batch) - target).square().sum()
            loss = lost / len(batch) * (len(samples) / energy)
            if attention is not None:
                loss = loss + settings.attention_weight * attention(batch)
            optimizer.zero_grad()
            loss.backward()
        for name, linear in linears.items():
            assert linear.weight.grad is not None
            linear.weight.grad.masked_fill_(~kept[name], 0.0)
        optimizer.step()
    error = block_error(pruned, wanted)
    better = error <= start_error  # False for NaN
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.requires_grad_(False)
            if not better:
                linear.weight.copy_(before[name])
    return error if better else start_error


class _AttentionTerm:
    """Relative error of the attention matrices within two blocks, per sample.

    Call it after the pruned block has run on the batch: it goes on from there.
    """

    def __init__(self, dense: Block, pruned: Block):
        self.dense, self.pruned = dense, pruned
        self.replicas = {
            name: AttentionReplica(attention)
            for name, attention in attention_modules(dense.module).items()
        }
        self.then = self._watched(dense)
        self.now = self._watched(pruned)

    def _watched(self, block: Block) -> dict[str, tuple[Any, Any]]:
        """Fills with the arguments of each attention module when the block runs."""
        seen: dict[str, tuple[Any, Any]] = {}

        def hook(name: str) -> Any:
            return lambda _, args, kwargs: seen.update({name: (args, kwargs)})

        for name in self.replicas:
            attention = block.module.get_submodule(name)
            attention.register_forward_pre_hook(hook(name), with_kwargs=True)
        return seen

    def __call__(self, batch: list[int]) -> Tensor:
        total = torch.zeros((), device=self.pruned.device)
        with torch.no_grad():
            self.dense(batch)
        for name, replica in self.replicas.items():
            weights = self.pruned.module.get_submodule(name).named_parameters()
            args, kwargs = _in_float32(self.then[name])
            with torch.no_grad():
                reference = replica(args, kwargs)
            args, kwargs = _in_float32(self.now[name])
            call = replica(args, kwargs, dict(weights))
            error = attention_error(reference, call.query, call.key)
            total = total + error / attention_norms(reference).matrix
        return total


def _in_float32(arguments: Any) -> Any:
    def to(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, to, arguments)
