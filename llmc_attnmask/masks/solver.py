"""Learn the masks of one attention layer on the error of its attention matrix.

The problem, for projections W_p (p in q, k) of one layer and calibration inputs X:

    min over M_p and U_p of  (1 - w) * ||A - A~||_F^2 / ||A||_F^2
                           + w * ||(A - A~) V W_o||_F^2 / ||A V W_o||_F^2
                           + lambda/2 * mean(M^2),     A~ from the weights M_p o U_p

The masks M are relaxed (``relaxation.py``), their scores follow Adam on mini-batches of
calibration samples, and the temperature falls until the relaxed mask is a hard one. In
light mode the survivors U stay the dense W; in accuracy mode they are learned with the
masks, from W on, and what SparseGPT finds is the solution to beat.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from loguru import logger
from torch import Tensor

from llmc_attnmask.attention.capture import (
    AttentionCall,
    AttentionInputs,
    AttentionReplica,
)
from llmc_attnmask.attention.matrix import attention_error, attention_norms
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.masks.relaxation import soft_top_k
from llmc_attnmask.masks.start import (
    input_hessians,
    sparsegpt_weights,
    wanda_scores,
)
from llmc_attnmask.masks.structure import MaskStructure

_HELD_BACK_ONE_IN = 8  # samples that choose the best mask instead of teaching it
_CHECKS = 8  # how often the hard mask is measured on them
_ANNEALED = 0.8  # share of the steps in which the temperature falls
_HOT, _COLD = 1.0, 0.05  # temperatures, in units of the mean score
_SURVIVOR_STEP = 0.02  # Adam's step of surviving weights, in standard deviations of W


@dataclass(frozen=True)
class SolverSettings:
    """How the masks of a layer are learned; see the modifier for the meaning."""

    steps: int
    learning_rate: float
    batch_size: int
    l2_penalty: float
    output_weight: float
    seed: int
    update_weights: bool = False  # accuracy mode


@dataclass
class MaskSolution:
    """Hard masks of one layer, True where a weight is kept, and how they came about."""

    masks: dict[Role, Tensor]
    weights: dict[Role, Tensor]  # [rows, columns], zero where pruned
    start_error: float  # of the start, on the held-back samples
    error: float  # of what is returned, on the same samples
    curve: list[float] = field(default_factory=list)  # training loss per step


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

    The start is Wanda's mask, or SparseGPT's mask and weights if survivors are updated.

    :param replica: the attention module, with its dense weights
    :param inputs: calibration inputs of the module, at least one sample
    :param projections: all of q, k, v, o (o weighs the output error)
    :param sparsity: share of each projection's entries that is pruned
    """
    layer = _Layer(replica, inputs, projections, prune, settings.output_weight)
    children = {projections[role].child for role in prune}
    hessians = input_hessians(replica, inputs, children)
    dense = {role: layer.dense(role) for role in prune}
    scores: dict[Role, Tensor] = {}
    masks: dict[Role, Tensor] = {}
    weights: dict[Role, Tensor] = {}
    for role in prune:
        hessian = hessians[projections[role].child]
        scores[role] = wanda_scores(dense[role], hessian)
        if settings.update_weights:
            start = sparsegpt_weights(dense[role], hessian, structure, sparsity)
            # unstructured SparseGPT prunes a few more than asked for: keep some zeros
            masks[role] = structure.mask(start.abs(), sparsity)
        else:
            masks[role] = structure.mask(scores[role], sparsity)
            start = dense[role]
        weights[role] = start.masked_fill(~masks[role], 0.0)
    start_error = layer.held_back_error(weights)
    if not math.isfinite(start_error):
        raise ValueError(
            f"the attention error is {start_error} before any step: the calibration "
            "inputs or the weights overflow or are no numbers"
        )
    solution = MaskSolution(masks, weights, start_error, start_error)
    kept = {role: structure.kept(dense[role], sparsity) for role in prune}
    entries = {role: structure.groups(dense[role]).shape[-1] for role in prune}
    if all(kept[role] in (0, entries[role]) for role in prune):
        return solution  # nothing to choose

    values = {role: dense[role].clone() for role in prune}
    learned = [(scores[role], settings.learning_rate) for role in prune]
    if settings.update_weights:
        learned += [
            (values[role], _SURVIVOR_STEP * dense[role].std().item()) for role in prune
        ]
    optimizer = torch.optim.Adam(
        {"params": [tensor.requires_grad_()], "peak": peak} for tensor, peak in learned
    )
    generator = torch.Generator().manual_seed(settings.seed)
    batches = inputs.minibatches(layer.training, settings.batch_size, generator)
    check_every = max(1, settings.steps // _CHECKS)
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        progress = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * progress))
        temperature = _HOT * (_COLD / _HOT) ** min(1.0, progress / _ANNEALED)
        with torch.enable_grad():
            relaxed = {
                role: soft_top_k(
                    structure.groups(scores[role]), kept[role], temperature
                ).view(dense[role].shape)
                for role in prune
            }
            loss = layer.error(batch, {r: relaxed[r] * values[r] for r in prune})
            if settings.l2_penalty:
                penalty = sum(mask.square().mean() for mask in relaxed.values())
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
            found = {r: structure.mask(scores[r].detach(), sparsity) for r in prune}
            weights = {r: values[r].detach().masked_fill(~found[r], 0.0) for r in prune}
            error = layer.held_back_error(weights)
            if error < solution.error:
                solution.masks, solution.weights = found, weights
                solution.error = error
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
        # an output projection of zeros lets no error through
        share = output_weight / output if output else 0.0
        self.output_weight = share * len(self.held_back)

    def dense(self, role: Role) -> Tensor:
        """The dense weight of a projection [rows, columns]."""
        projection = self.projections[role]
        return projection.of(self._weight(projection))

    def error(self, batch: list[int], weights: Mapping[Role, Tensor]) -> Tensor:
        """Relative error per sample of a batch with pruned weights [rows, columns]."""
        with torch.no_grad():
            reference = self._call(batch)
        pruned = self._call(batch, self._replaced(weights))
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
    def held_back_error(self, weights: Mapping[Role, Tensor]) -> float:
        total = sum(
            self.error(batch, weights).item() * len(batch)
            for batch in self.inputs.batches(self.held_back, 8)
        )
        return total / len(self.held_back)

    def _replaced(self, pruned: Mapping[Role, Tensor]) -> dict[str, Tensor]:
        """The Linears' weights with the rows of the pruned projections in place."""
        weights: dict[str, Tensor] = {}
        for role, projection in self.projections.items():
            name = projection.parameter
            if name not in weights:
                weights[name] = self._weight(projection).clone()
            weights[name][projection.rows] = pruned[role]
        return weights

    def _weight(self, projection: Projection) -> Tensor:
        return self.replica.module.get_parameter(projection.parameter).detach()

    def _call(
        self, batch: list[int], weights: Mapping[str, Tensor] | None = None
    ) -> AttentionCall:
        args, kwargs = self.inputs.batch(batch, self.replica.device, self.replica.dtype)
        return self.replica(args, kwargs, weights)
