"""The error on which the masks of v and o are learned; formula: ``objective.py``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import attention_context
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.calibration.micro_batches import MAX_MICRO_BATCH, Sums, sample_count
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.solvers.attention_layer import AttentionLayer, Weights
from llmc_attnmask.solvers.objective import Curvature, Objective


class OutputObjective(Objective):
    """The objective for v and o.

    :param pruned: weights of q and k, where these are already pruned
    """

    def __init__(
        self,
        layer: AttentionLayer,
        roles: Sequence[Role],
        pruned: Weights,
        batch_size: int = MAX_MICRO_BATCH,
    ):
        super().__init__(layer, roles, batch_size)
        self.pruned = dict(pruned)

        def run(samples: list[int]) -> float:
            dense = self.layer.call(samples)
            return self._output(dense).square().sum().item()

        norms = sum(norm for _, norm in self.runner(self.validation, run))
        (total,) = all_sum_numbers(norms)
        self.weight = sample_count(self.validation) / total if total else 0.0

    def call(self, samples: list[int], weights: Weights | None = None) -> AttentionCall:
        return self.layer.call(samples, self.pruned | dict(weights or {}))

    @torch.no_grad()
    def _output(self, call: AttentionCall) -> Tensor:
        return attention_context(call, call.value) @ self.layer.output_projection().T

    def error(self, samples: list[int], weights: Weights) -> Tensor:
        with torch.no_grad():
            reference = self._output(self.layer.call(samples))
        pruned = self.call(samples, {r: w for r, w in weights.items() if r != "o"})
        context = attention_context(pruned, pruned.value)
        output = context @ weights.get("o", self.layer.output_projection()).T
        return (output - reference).square().sum() * self.weight

    def curvature(self) -> Curvature:
        """See the base class; v acts through A~ and W_o, and o's inputs are A~ V."""
        hessians: Sums[Role] = Sums()
        for _, terms in self.runner(self.micro_batches, self._terms):
            for role, hessian in terms:
                hessians.add(role, hessian)
        found: Curvature = {}
        for role, hessian in hessians.totals().items():
            found[role] = (hessian, None)
            if role == "v":
                call = self.call([0])
                heads, groups = call.query.shape[1], call.key.shape[1]
                by_head = self.layer.output_projection().unflatten(
                    -1, (groups, heads // groups, -1)
                )
                found[role] = (
                    hessian,
                    torch.einsum("dgha,dghb->gab", by_head, by_head),
                )
        return found

    def _terms(self, samples: list[int]) -> list[tuple[Role, Tensor]]:
        """Return H by sample: that of v needs the hidden states once per head."""
        terms: list[tuple[Role, Tensor]] = []
        for sample in samples:
            call, linears = self._recorded_call([sample])
            heads, groups = call.query.shape[1], call.key.shape[1]
            with torch.no_grad():
                for role in self.roles:
                    if role == "o":
                        x = attention_context(call, call.value)
                    else:
                        x = linears[self.layer.projections[role].child][0]
                        shared = x[:, None].expand(-1, groups, -1, -1)
                        x = attention_context(call, shared).unflatten(-1, (heads, -1))
                    x = x.flatten(0, -2)
                    terms.append((role, x.T @ x))
        return terms
