"""Prune Linears by the error of their own outputs, as ALPS does (arXiv 2406.07831)."""

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
from llmc_attnmask.solvers import least_squares
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
        """Add inputs [..., columns] from this rank's samples."""
        x = x.detach().flatten(0, -2).float()
        self._sums.add(_HESSIAN, x.T @ x)

    def own_diagonal(self) -> Tensor:
        """Return the diagonal of X^T X over this rank's samples, float64 [columns]."""
        return self._sums.own(_HESSIAN).diagonal()

    def hessian(self) -> Tensor:
        """Return X^T X over the samples of all ranks, float32 [columns, columns].

        All ranks must call it, each once.

        :raises ValueError: if it is not finite
        """
        columns = self.linear.in_features
        device = get_execution_device(self.linear)
        # a rank whose samples do not reach an expert has no term
        self._sums.add(_HESSIAN, torch.zeros(columns, columns, device=device))
        hessian = self._sums.totals()[_HESSIAN]
        if not hessian.isfinite().all():
            raise ValueError(
                f"the inputs of {self.name} overflow or are not finite on the "
                "calibration data; repair the checkpoint or the data first"
            )
        return hessian

    def weight(self, device: torch.device) -> Tensor:
        """Return the dense weight, float32 [rows, columns]."""
        return self.linear.weight.detach().to(device, torch.float32)


@dataclass
class LinearSolution:
    """The mask and the surviving weights found for a Linear."""

    weight: Tensor  # float32 [rows, columns]
    kept: Tensor  # bool [rows, columns]
    error: float = math.nan  # relative, of the output
    fallback: str | None = None  # what was not finite, if anything

    def sent_from(self, source: int) -> "LinearSolution":
        """Return one rank's solution on all ranks; the others pass one of its shape."""
        return LinearSolution(
            send_from(source, self.weight), send_from(source, self.kept)
        )


@torch.no_grad()
def prune_linears(
    problems: Sequence[LinearProblem],
    structure: MaskStructure,
    sparsities: Sequence[float],
) -> list[LinearSolution]:
    """Find masks and surviving weights of some Linears, which the ranks share out.

    If the solved weights of a Linear are not finite, it gets Wanda's mask instead, and
    its surviving weights keep their values.
    """
    hessians = [problem.hessian() for problem in problems]
    solutions: list[LinearSolution] = []
    for position, hessian in enumerate(hessians):
        weight = problems[position].weight(hessian.device)
        if owner(position) == rank():
            kept, solved = least_squares.prune(
                hessian, weight, structure, sparsities[position]
            )
            solutions.append(LinearSolution(solved, kept))
        else:  # of the owner's shape
            everything = torch.ones_like(weight, dtype=torch.bool)
            solutions.append(LinearSolution(weight, everything))
    for position, hessian in enumerate(hessians):
        problem = problems[position]
        weight = problem.weight(hessian.device)
        found = solutions[position].sent_from(owner(position))
        if not found.weight.isfinite().all():
            kept = structure.mask(wanda_scores(weight, hessian), sparsities[position])
            fault = "the solved weights are not finite"
            found = LinearSolution(weight, kept, fallback=fault)
            logger.warning(f"{problem.name}: {found.fallback}; Wanda's mask instead")
        change = found.weight.masked_fill(~found.kept, 0.0) - weight
        found.error = _squared_output(change, hessian) / _squared_output(
            weight, hessian
        )
        solutions[position] = found
    return solutions


def _squared_output(weight: Tensor, hessian: Tensor) -> float:
    """Return ||X W^T||_F^2."""
    return float(((weight @ hessian) * weight).sum().clamp_min(1e-30))
