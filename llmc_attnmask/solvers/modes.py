"""What a descent on an attention layer moves, by mode.

Light mode moves the scores of relaxed masks (``relaxation.py``), and the temperature
falls until the relaxed masks are hard. Accuracy mode moves the surviving weights, and
the masks are fixed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from llmc_attnmask.attention.projections import Role
from llmc_attnmask.calibration.micro_batches import MicroBatch
from llmc_attnmask.solvers.descent import Derivative
from llmc_attnmask.solvers.objective import Objective
from llmc_attnmask.solvers.relaxation import soft_top_k
from llmc_attnmask.solvers.settings import SolverSettings

_ANNEALED = 0.8  # share of the steps during which the temperature falls
_HOT, _COLD = 1.0, 0.05  # temperatures, relative to the mean score
# peak learning rate, in standard deviations of W; the second-order solution is so close
# that three times as much leads away from it in 6 of a real model's 30 layers
_SURVIVOR_STEP = 0.003

Tensors = dict[Role, Tensor]


class Mode(ABC):
    """The masks and weights of a descent, by projection, each [rows, columns]."""

    settled: float  # progress from which the masks are hard
    learned: list[tuple[Tensor, float]]  # what moves, with peak learning rates

    @abstractmethod
    def differentiate(self, batch: list[MicroBatch], progress: float) -> Derivative:
        """Return a mini-batch's loss after a share ``progress`` of the steps."""

    @abstractmethod
    def hard(self) -> tuple[Tensors, Tensors]:
        """Return the current hard masks, True where kept, and the pruned weights."""


class LightMode(Mode):
    """Moves the scores; surviving weights keep their values.

    :param scores: initial scores, mean 1
    """

    settled = _ANNEALED

    def __init__(self, objective: Objective, settings: SolverSettings, scores: Tensors):
        self.objective, self.settings, self.scores = objective, settings, scores
        self.dense = {role: objective.layer.dense(role) for role in scores}
        self.learned = [(score, settings.learning_rate) for score in scores.values()]

    def differentiate(self, batch: list[MicroBatch], progress: float) -> Derivative:
        with torch.enable_grad():
            masks = self._relaxed(progress)
            weights = {role: mask * self.dense[role] for role, mask in masks.items()}
            loss, gradients = self.objective.gradient(batch, weights)
            # with nothing to choose in a projection, its mask depends on no score
            at = [w for w in weights.values() if w.requires_grad]
            upstream = [gradients[r] for r, w in weights.items() if w.requires_grad]
            if self.settings.l2_penalty:
                squares = torch.stack([m.square().mean() for m in masks.values()])
                penalty = self.settings.l2_penalty / 2 * squares.sum()
                loss += penalty.item()
                at.append(penalty)
                upstream.append(torch.ones_like(penalty))
        return Derivative(loss, at, upstream)

    def _relaxed(self, progress: float) -> Tensors:
        temperature = _HOT * (_COLD / _HOT) ** min(1.0, progress / _ANNEALED)
        structure, sparsity = self.settings.structure, self.settings.sparsity
        return {
            role: soft_top_k(
                structure.groups(score), structure.kept(score, sparsity), temperature
            ).view(score.shape)
            for role, score in self.scores.items()
        }

    def hard(self) -> tuple[Tensors, Tensors]:
        masks = {r: self.settings.mask(s.detach()) for r, s in self.scores.items()}
        return masks, pruned(masks, self.dense)


class AccuracyMode(Mode):
    """Moves the surviving weights; the masks are fixed.

    The l2 penalty, which is on relaxed masks, does not apply.

    :param values: initial values of the surviving weights
    """

    settled = 0.0

    def __init__(self, objective: Objective, masks: Tensors, values: Tensors):
        self.objective, self.masks, self.values = objective, masks, values
        self.learned = [
            (value, _SURVIVOR_STEP * objective.layer.dense(role).std().item())
            for role, value in values.items()
        ]

    def differentiate(self, batch: list[MicroBatch], progress: float) -> Derivative:
        with torch.enable_grad():
            weights = {role: self.masks[role] * v for role, v in self.values.items()}
            loss, gradients = self.objective.gradient(batch, weights)
        return Derivative(
            loss, list(weights.values()), [gradients[role] for role in weights]
        )

    def hard(self) -> tuple[Tensors, Tensors]:
        return self.masks, pruned(self.masks, self.values)


def pruned(masks: Mapping[Role, Tensor], values: Mapping[Role, Tensor]) -> Tensors:
    """Return the values, with +0.0 where a mask is False."""
    return {r: values[r].detach().masked_fill(~m, 0.0) for r, m in masks.items()}
