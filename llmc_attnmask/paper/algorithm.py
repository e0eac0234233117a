"""Projected gradient descent on the relaxed mask, then a threshold at the sparsity."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmc_attnmask.paper.problem import FusedProblem

_GROW, _SHRINK = 1.5, 0.5


@dataclass
class Descent:
    """A run, and what was measured before each of its steps."""

    mask: Tensor  # the relaxed mask [d, d] at the end
    losses: list[float] = field(default_factory=list)
    squared_gradients: list[float] = field(default_factory=list)  # projected

    def pl_ratios(self, minimum: float) -> list[float]:
        """Return ||gradient||^2 / (2 (L - L*)) per step, bounded below where PL holds.

        PL is the Polyak-Lojasiewicz inequality.

        :param minimum: L*, the lowest known loss; steps within rounding of it are
            left out
        """
        floor = 1e-9 * abs(minimum)
        return [
            squared / (2 * (loss - minimum))
            for loss, squared in zip(self.losses, self.squared_gradients, strict=True)
            if loss - minimum > floor
        ]


def projected_gradient_descent(
    problem: FusedProblem, steps: int, start: Tensor | None = None
) -> Descent:
    """Minimize L over [0, 1]^{d x d}; the loss never rises.

    Backtracking finds the step size (sufficient decrease), so no Lipschitz constant is
    needed.

    :param start: initial mask [d, d]; by default all ones, the dense weight
    """
    mask = torch.ones_like(problem.weight) if start is None else start.clone()
    descent = Descent(mask)
    loss, gradient = problem.loss_and_gradient(mask)
    step_size = 1.0 / max(gradient.abs().max().item(), 1e-30)
    for _ in range(steps):
        descent.losses.append(loss.item())
        descent.squared_gradients.append(
            _projected(mask, gradient).square().sum().item()
        )
        step_size *= _GROW
        while True:
            candidate = (mask - step_size * gradient).clamp(0, 1)
            move = candidate - mask
            bound = (
                loss + (gradient * move).sum() + move.square().sum() / (2 * step_size)
            )
            candidate_loss, candidate_gradient = problem.loss_and_gradient(candidate)
            if candidate_loss <= bound or step_size < 1e-30:
                break
            step_size *= _SHRINK
        if candidate_loss > loss:  # the limit of floating-point precision
            break
        mask, loss, gradient = candidate, candidate_loss, candidate_gradient
    descent.mask = mask
    return descent


def threshold(mask: Tensor, sparsity: float) -> Tensor:
    """Keep the largest entries and prune exactly ``round(sparsity * d * d)``.

    :return: bool [d, d], True where the weight is kept
    """
    pruned = round(sparsity * mask.numel())
    order = mask.flatten().sort(stable=True).indices
    kept = torch.ones(mask.numel(), dtype=torch.bool)
    kept[order[:pruned]] = False
    return kept.view(mask.shape)


def _projected(mask: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient without what points out of the box; zero at a minimum."""
    blocked = ((mask <= 0) & (gradient > 0)) | ((mask >= 1) & (gradient < 0))
    return gradient.masked_fill(blocked, 0.0)
