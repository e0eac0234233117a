"""The errors on which the masks of an attention layer are learned.

For q and k (``matrix_objective.py``), where A~ is computed from the pruned q and k:

    (1 - w) * ||A - A~||_F^2 / ||A||_F^2 + w * ||(A - A~) V W_o||_F^2 / ||A V W_o||_F^2

For v and o (``output_objective.py``), where A~ is that of the already pruned q and k:

    ||A V W_o - A~ V~ W~_o||_F^2 / ||A V W_o||_F^2

To second order, each is a quadratic form G x H in the change of a projection's weight
(``least_squares.py``). H comes from the projection's inputs, and G, with one block per
head, from how much its outputs matter (Kronecker-factored as in K-FAC, arXiv
1503.05671).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.calibration.memory import MicroBatchRunner
from llmc_attnmask.calibration.micro_batches import (
    MAX_MICRO_BATCH,
    MicroBatch,
    micro_batches_of,
    sample_count,
    train_validation_split,
)
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.solvers.attention_layer import AttentionLayer, Weights
from llmc_attnmask.solvers.descent import mean_gradient

Curvature = dict[Role, tuple[Tensor, Tensor | None]]  # H and G, see ``curvature``


class Objective(ABC):
    """The error of one attention layer as a function of some projections' weights.

    :param roles: the projections to find weights for
    :param batch_size: calibration samples per step of a descent
    """

    def __init__(
        self,
        layer: AttentionLayer,
        roles: Sequence[Role],
        batch_size: int = MAX_MICRO_BATCH,
    ):
        self.layer, self.roles = layer, list(roles)
        self.micro_batches = micro_batches_of(layer.inputs, batch_size)
        self.train, self.validation = train_validation_split(self.micro_batches)
        self.runner = MicroBatchRunner()

    @abstractmethod
    def error(self, samples: list[int], weights: Weights) -> Tensor:
        """Return the sum of some samples' relative errors, differentiable."""

    @torch.no_grad()
    def validation_error(self, weights: Weights) -> float:
        """Return the mean relative error over the validation samples of all ranks."""

        def run(samples: list[int]) -> float:
            return self.error(samples, weights).item()

        total = sum(error for _, error in self.runner(self.validation, run))
        return all_sum_numbers(total)[0] / sample_count(self.validation)

    def gradient(
        self, micro_batches: Sequence[MicroBatch], weights: Weights
    ) -> tuple[float, dict[Role, Tensor]]:
        """Return the mean relative error over some micro-batches, and its gradients.

        The mean is over all ranks, each of which evaluates its own micro-batches.

        :return: the error, and a gradient [rows, columns] by projection
        """
        leaves = {r: w.detach().requires_grad_() for r, w in weights.items()}
        return mean_gradient(
            lambda samples: self.error(samples, leaves),
            leaves,
            micro_batches,
            self.runner,
        )

    @abstractmethod
    def curvature(self) -> Curvature:
        """Return H and G by projection at the dense weights, up to a common factor.

        :return: [columns, columns] and [heads, rows / heads, rows / heads]; G is None,
            which means 1, where the error is that of the projection's own outputs
        """

    def _recorded_call(
        self, samples: list[int]
    ) -> tuple[AttentionCall, dict[str, tuple[Tensor, Tensor]]]:
        """Return a call and, for each Linear before the softmax, (input, output).

        The call is differentiable in these outputs.
        """
        linears: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(child: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
            def record(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
                leaf = output.detach().requires_grad_()
                linears[child] = (args[0].detach(), leaf)
                return leaf

            return record

        projections, module = self.layer.projections, self.layer.replica.module
        children = {projections[r].child for r in self.roles if r != "o"}
        handles = [
            module.get_submodule(child).register_forward_hook(hook(child))
            for child in sorted(children)
        ]
        try:
            with torch.enable_grad():
                return self.call(samples), linears
        finally:
            for handle in handles:
                handle.remove()

    def call(self, samples: list[int], weights: Weights | None = None) -> AttentionCall:
        """Return the softmax's inputs, with some projections' weights replaced."""
        return self.layer.call(samples, weights)
