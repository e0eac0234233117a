"""ALPS (arXiv 2406.07831): prune Linears on the error of their own outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import get_execution_device
from loguru import logger
from torch import Tensor, nn

from llmc_attnmask.calibration.micro_batches import Sums
from llmc_attnmask.distributed import owner, rank, send_from
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.solvers.least_squares import choose_mask, solve
from llmc_attnmask.solvers.wanda import wanda_scores

_HESSIAN = "X^T X"


class LinearProblem:
    """A Linear to prune, and X^T X of its calibration inputs.

    :param name: of the Linear, for messages
    """

    def __init__(self, name: str, linear: nn.Linear):
        self.name, self.linear = name, linear
        self._sums: Sums[str] = Sums()

    def add(self, x: Tensor) -> None:
        """Add inputs [..., columns] that this rank's samples give."""
        x = x.detach().flatten(0, -2).float()
        self._sums.add(_HESSIAN, x.T @ x)

    def own_diagonal(self) -> Tensor:
        """The diagonal of X^T X over this rank's samples, float64 [columns]."""
        return self._sums.own(_HESSIAN).diagonal()

    def hessian(self) -> Tensor:
        """X^T X over the samples of all ranks, float32 [columns, columns].

        Every rank calls it once.

        :raises ValueError: if it is not finite
        """
        columns = self.linear.in_features
        device = get_execution_device(self.linear)
        # a rank whose samples do not reach an expert has no term
        self._sums.add(_HESSIAN, torch.zeros(columns, columns, device=device))
        hessian = self._sums.totals()[_HESSIAN]
        if not hessian.isfinite().all():
            raise ValueError(
                f"the inputs of {self.name} overflow or are no numbers on the "
                "calibration data; repair the checkpoint or the data first"
            )
        return hessian

    def weight(self, device: torch.device) -> Tensor:
        """The dense weight, float32 [rows, columns]."""
        return self.linear.weight.detach().to(device, torch.float32)


@dataclass
class LinearSolution:
    """What a Linear becomes."""

    weight: Tensor  # float32 [rows, columns]
    kept: Tensor  # bool [rows, columns]
    error: float = math.nan  # relative, of the output
    fallback: str | None = None  # what came out as no number, if anything did

    def sent_from(self, source: int) -> "LinearSolution":
        """A rank's solution, on every rank; the others give one of its shape."""
        return LinearSolution(
            send_from(source, self.weight), send_from(source, self.kept)
        )


@torch.no_grad()
def prune_linears(
    problems: Sequence[LinearProblem], structure: MaskStructure, sparsity: float
) -> list[LinearSolution]:
    """Masks and survivors of some Linears; every rank solves for one of them in turn.

    One whose survivors cannot be solved for gets Wanda's mask and keeps its values.
    """
    hessians = [problem.hessian() for problem in problems]
    solutions: list[LinearSolution] = []
    for position, hessian in enumerate(hessians):
        weight = problems[position].weight(hessian.device)
        if owner(position) == rank():
            solutions.append(_solved(weight, hessian, structure, sparsity))
        else:
            solutions.append(LinearSolution(weight, weight.isfinite()))
    for position, hessian in enumerate(hessians):
        problem = problems[position]
        weight = problem.weight(hessian.device)
        found = solutions[position].sent_from(owner(position))
        if not found.weight.isfinite().all():
            kept = structure.mask(wanda_scores(weight, hessian), sparsity)
            fault = "the solved weights are no finite numbers"
            found = LinearSolution(weight, kept, fallback=fault)
            logger.warning(f"{problem.name}: {found.fallback}; Wanda's mask instead")
        change = found.weight.masked_fill(~found.kept, 0.0) - weight
        found.error = _squared_output(change, hessian) / _squared_output(
            weight, hessian
        )
        solutions[position] = found
    return solutions


def _solved(
    weight: Tensor, hessian: Tensor, structure: MaskStructure, sparsity: float
) -> LinearSolution:
    """The mask and its best survivors; NaN where that fails."""
    target = weight @ hessian
    try:
        kept, start = choose_mask(hessian, target, weight, structure, sparsity)
        return LinearSolution(solve(hessian, target, start, kept), kept)
    except torch.linalg.LinAlgError:
        return LinearSolution(torch.full_like(weight, math.nan), weight.isfinite())


def _squared_output(weight: Tensor, hessian: Tensor) -> float:
    """||X W^T||_F^2"""
    return float(((weight @ hessian) * weight).sum().clamp_min(1e-30))
