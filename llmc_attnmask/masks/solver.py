"""Learn the masks of one attention layer on the error of its attention matrix.

The problem, for projections W_p (p in q, k) of one layer and calibration inputs X:

    min over masks M_p of   (1 - w) * ||A - A~||_F^2 / ||A||_F^2
                          + w * ||(A - A~) V W_o||_F^2 / ||A V W_o||_F^2
                          + lambda/2 * mean(M^2),     A~ from the weights M_p o W_p

The masks are relaxed (``relaxation.py``), their scores follow Adam on mini-batches of
calibration samples, and the temperature falls until the relaxed mask is a hard one.
What survives keeps its original value.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor, nn

from llmc_attnmask.attention.capture import (
    AttentionCall,
    AttentionInputs,
    AttentionReplica,
)
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.masks.relaxation import soft_top_k
from llmc_attnmask.masks.structure import MaskStructure

_HELD_BACK_ONE_IN = 8  # samples that choose the best mask instead of teaching it
_CHECKS = 4  # how often the hard mask is measured on them
_ANNEALED = 0.8  # share of the steps in which the temperature falls
_HOT, _COLD = 1.0, 0.05  # temperatures, in units of the mean score


@dataclass(frozen=True)
class SolverSettings:
    """How the masks of a layer are learned; see the modifier for the meaning."""

    steps: int
    learning_rate: float
    batch_size: int
    l2_penalty: float
    output_weight: float
    seed: int


@dataclass
class MaskSolution:
    """Hard masks of one layer, True where a weight is kept, and how they came about."""

    masks: dict[Role, Tensor]
    start_error: float  # of the starting mask, on the held-back samples
    error: float  # of the returned mask, on the same samples
    curve: list[float] = field(default_factory=list)  # training loss per step


def input_norms(
    replica: AttentionReplica,
    inputs: AttentionInputs,
    projections: Sequence[Projection],
) -> dict[str, Tensor]:
    """Norm of every input feature of the projections' Linears over the calibration.

    :return: child name -> [in-features]
    """
    sums: dict[str, Tensor] = {}

    def add(child: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].detach().flatten(0, -2).square().sum(0)
            sums[child] = sums.get(child, torch.zeros_like(squares)) + squares

        return hook

    handles = [
        replica.module.get_submodule(child).register_forward_pre_hook(add(child))
        for child in {p.child for p in projections}
    ]
    try:
        with torch.no_grad():
            for indices in inputs.batches(range(len(inputs)), 8):
                replica(*inputs.batch(indices, replica.device, replica.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {child: total.sqrt() for child, total in sums.items()}


def learn_masks(
    replica: AttentionReplica,
    inputs: AttentionInputs,
    projections: Mapping[Role, Projection],
    prune: Sequence[Role],
    structure: MaskStructure,
    sparsity: float,
    settings: SolverSettings,
) -> MaskSolution:
    """Masks for the projections named in ``prune``; never worse than their start.

    :param replica: the attention module, with its dense weights
    :param inputs: calibration inputs of the module, at least one sample
    :param projections: all of q, k, v, o (o weighs the output error)
    :param sparsity: share of each projection's entries that is pruned
    """
    layer = _Layer(replica, inputs, projections, prune, settings.output_weight)
    scores = {
        role: structure.groups(score) for role, score in layer.start_scores().items()
    }
    shapes = {role: layer.dense[role].shape for role in prune}
    kept = {role: structure.kept(layer.dense[role], sparsity) for role in prune}

    def hard(scores: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
        return {
            role: structure.mask(scores[role].detach().view(shapes[role]), sparsity)
            for role in prune
        }

    best = hard(scores)
    start_error = best_error = layer.held_back_error(best)
    solution = MaskSolution(best, start_error, start_error)
    if all(kept[role] in (0, scores[role].shape[-1]) for role in prune):
        return solution  # nothing to choose

    generator = torch.Generator().manual_seed(settings.seed)
    batches = inputs.minibatches(layer.training, settings.batch_size, generator)
    for score in scores.values():
        score.requires_grad_()
    optimizer = torch.optim.Adam(scores.values(), lr=settings.learning_rate)
    check_every = max(1, settings.steps // _CHECKS)
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        progress = step / settings.steps
        optimizer.param_groups[0]["lr"] = (
            settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        )
        temperature = _HOT * (_COLD / _HOT) ** min(1.0, progress / _ANNEALED)
        with torch.enable_grad():
            masks = {
                role: soft_top_k(scores[role], kept[role], temperature)
                for role in prune
            }
            loss = layer.error(batch, {r: masks[r].view(shapes[r]) for r in prune})
            if settings.l2_penalty:
                penalty = sum(mask.square().mean() for mask in masks.values())
                loss = loss + settings.l2_penalty / 2 * penalty
            if not loss.isfinite():
                logger.warning(
                    f"step {step}: the loss is {loss.item()}; the best mask stays"
                )
                break
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        solution.curve.append(loss.item())
        if (step + 1) % check_every == 0 or step + 1 == settings.steps:
            found = hard(scores)
            error = layer.held_back_error(found)
            if error < best_error:
                best, best_error = found, error
    solution.masks, solution.error = best, best_error
    return solution


class _Layer:
    """One attention layer's error as a function of its masks."""

    def __init__(
        self,
        replica: AttentionReplica,
        inputs: AttentionInputs,
        projections: Mapping[Role, Projection],
        prune: Sequence[Role],
        output_weight: float,
    ):
        self.replica, self.inputs = replica, inputs
        self.projections = {role: projections[role] for role in prune}
        self.dense = {
            role: p.of(self._weight(p)) for role, p in self.projections.items()
        }
        self.output_projection = self._weight(projections["o"])
        samples = range(len(inputs))
        self.held_back = list(samples)[_HELD_BACK_ONE_IN - 1 :: _HELD_BACK_ONE_IN]
        self.training = [i for i in samples if i not in set(self.held_back)]
        if not self.held_back:  # too few samples to spare any
            self.held_back = self.training
        matrix = output = 0.0
        for batch in inputs.batches(self.held_back, 8):
            call = self._call(batch)
            norms = attention_norms(call, self.output_projection)
            matrix += norms.matrix
            output += norms.output
        self.matrix_weight = (1 - output_weight) * len(self.held_back) / matrix
        self.output_weight = output_weight * len(self.held_back) / output

    def start_scores(self) -> dict[Role, Tensor]:
        """Wanda's |W| * ||x|| (arXiv 2306.11695), each row's mean brought to 1."""
        norms = input_norms(self.replica, self.inputs, list(self.projections.values()))
        scores = {}
        for role, projection in self.projections.items():
            score = self.dense[role].abs() * norms[projection.child]
            scores[role] = score / score.mean(-1, keepdim=True).clamp_min(1e-30)
        return scores

    def error(self, batch: list[int], masks: Mapping[Role, Tensor]) -> Tensor:
        """Relative error per sample of a batch under (relaxed or hard) masks."""
        with torch.no_grad():
            reference = self._call(batch)
        pruned = self._call(batch, self._masked(masks))
        total = attention_error(
            reference,
            pruned.query,
            pruned.key,
            matrix_weight=self.matrix_weight,
            output_weight=self.output_weight,
            output_projection=self.output_projection,
        )
        return total / len(batch)

    @torch.no_grad()
    def held_back_error(self, masks: Mapping[Role, Tensor]) -> float:
        total = sum(
            self.error(batch, masks).item() * len(batch)
            for batch in self.inputs.batches(self.held_back, 8)
        )
        return total / len(self.held_back)

    def _masked(self, masks: Mapping[Role, Tensor]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for role, projection in self.projections.items():
            name = projection.parameter
            if name not in weights:
                weights[name] = self._weight(projection).clone()
            weights[name][projection.rows] = self.dense[role] * masks[role]
        return weights

    def _weight(self, projection: Projection) -> Tensor:
        return self.replica.module.get_parameter(projection.parameter).detach()

    def _call(
        self, batch: list[int], weights: Mapping[str, Tensor] | None = None
    ) -> AttentionCall:
        args, kwargs = self.inputs.batch(batch, self.replica.device, self.replica.dtype)
        return self.replica(args, kwargs, weights)
