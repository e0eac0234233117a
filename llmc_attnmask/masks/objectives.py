"""What masks of an attention layer are learned on, as a function of its weights.

q and k, ``MatrixObjective``, with A~ from the pruned q and k:

    (1 - w) * ||A - A~||_F^2 / ||A||_F^2 + w * ||(A - A~) V W_o||_F^2 / ||A V W_o||_F^2

v and o, ``OutputObjective``, with A~ as the pruned q and k leave it:

    ||A V W_o - A~ V~ W~_o||_F^2 / ||A V W_o||_F^2

To second order, each is a quadratic form G x H in the change of a projection's weight
(``least_squares.py``): H from the projection's inputs, G from how much its outputs
matter, one block per head (Kronecker-factored as in K-FAC, arXiv 1503.05671).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionCall, AttentionReplica
from llmc_attnmask.attention.inputs import ModuleInputs
from llmc_attnmask.attention.matrix import (
    AttentionNorms,
    attention_change,
    attention_context,
    attention_error,
    attention_norms,
    probe_gradients,
)
from llmc_attnmask.attention.projections import Projection, Role

_SAMPLES_AT_ONCE = 8
_HELD_BACK_ONE_IN = 8  # samples that choose the best mask instead of teaching it

Weights = Mapping[Role, Tensor]  # projection -> weight [rows, columns]
Curvature = dict[Role, tuple[Tensor, Tensor | None]]  # H and G, see ``curvature``


class Objective(ABC):
    """Error of one attention layer as a function of some projections' weights.

    :param replica: the attention module, with its dense weights
    :param inputs: calibration inputs of the module, at least one sample
    :param projections: all of q, k, v, o
    :param roles: the projections whose weights are sought
    """

    def __init__(
        self,
        replica: AttentionReplica,
        inputs: ModuleInputs,
        projections: Mapping[Role, Projection],
        roles: Sequence[Role],
    ):
        self.replica, self.inputs = replica, inputs
        self.projections, self.roles = projections, list(roles)
        samples = range(len(inputs))
        self.held_back = list(samples)[_HELD_BACK_ONE_IN - 1 :: _HELD_BACK_ONE_IN]
        self.training = [i for i in samples if i not in set(self.held_back)]
        if not self.held_back:  # too few samples to spare any
            self.held_back = self.training

    def dense(self, role: Role) -> Tensor:
        """The dense weight of a projection [rows, columns]."""
        projection = self.projections[role]
        weight = self.replica.module.get_parameter(projection.parameter)
        return projection.of(weight.detach())

    def output_projection(self) -> Tensor:
        """W_o [D, H * dv]; the identity where the module has none within."""
        if "o" in self.projections:
            return self.dense("o")
        value = self.dense("v")
        return torch.eye(len(value), dtype=value.dtype, device=value.device)

    @abstractmethod
    def error(self, batch: list[int], weights: Weights) -> Tensor:
        """Relative error per sample of a batch, differentiable in the weights."""

    @torch.no_grad()
    def held_back_error(self, weights: Weights) -> float:
        total = sum(
            self.error(batch, weights).item() * len(batch)
            for batch in self.batches(self.held_back)
        )
        return total / len(self.held_back)

    @abstractmethod
    def curvature(self) -> Curvature:
        """H and G of each projection at the dense weights, up to a common factor.

        :return: [columns, columns] and [heads, rows / heads, rows / heads]; None where
            the outputs are what the error is about, so that G = 1
        """

    def _recorded_call(
        self, batch: list[int]
    ) -> tuple[AttentionCall, dict[str, tuple[Tensor, Tensor]]]:
        """The call and, of every Linear before the softmax, (input, output).

        The call is differentiable in the outputs.
        """
        linears: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(child: str) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
            def record(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
                leaf = output.detach().requires_grad_()
                linears[child] = (args[0].detach(), leaf)
                return leaf

            return record

        children = {self.projections[r].child for r in self.roles if r != "o"}
        handles = [
            self.replica.module.get_submodule(child).register_forward_hook(hook(child))
            for child in sorted(children)
        ]
        try:
            with torch.enable_grad():
                return self.call(batch), linears
        finally:
            for handle in handles:
                handle.remove()

    def batches(self, samples: Sequence[int]) -> list[list[int]]:
        return list(self.inputs.batches(samples, _SAMPLES_AT_ONCE))

    def call(self, batch: list[int], weights: Weights | None = None) -> AttentionCall:
        """The softmax's inputs with some projections' weights replaced."""
        args, kwargs = self.inputs.batch(batch, self.replica.device, self.replica.dtype)
        return self.replica(args, kwargs, self._parameters(weights or {}))

    def _parameters(self, weights: Weights) -> dict[str, Tensor]:
        """The Linears' weights with the projections' rows in place."""
        parameters: dict[str, Tensor] = {}
        for role, weight in weights.items():
            projection = self.projections[role]
            name = projection.parameter
            if name not in parameters:
                parameter = self.replica.module.get_parameter(name)
                parameters[name] = parameter.detach().clone()
            projection.put(parameters[name], weight)
        return parameters


class MatrixObjective(Objective):
    """Of q and k.

    :param output_weight: w of the formula above
    """

    def __init__(
        self,
        replica: AttentionReplica,
        inputs: ModuleInputs,
        projections: Mapping[Role, Projection],
        roles: Sequence[Role],
        output_weight: float,
    ):
        super().__init__(replica, inputs, projections, roles)
        matrix = output = 0.0
        for batch in self.batches(self.held_back):
            norms = attention_norms(self.call(batch), self.output_projection())
            matrix += norms.matrix
            output += norms.output
        self.norms = AttentionNorms(matrix, output)
        self.matrix_weight = (1 - output_weight) * len(self.held_back) / matrix
        # an output projection of zeros lets no error through
        share = output_weight / output if output else 0.0
        self.output_weight = share * len(self.held_back)

    @torch.no_grad()
    def held_back_errors(self, weights: Weights) -> AttentionNorms:
        """The two errors of the formula, each relative, before they are weighed."""
        matrix = output = 0.0
        for batch in self.batches(self.held_back):
            pruned = self.call(batch, weights)
            change = attention_change(
                self.call(batch), pruned.query, pruned.key, self.output_projection()
            )
            matrix += change.matrix
            output += change.output
        return AttentionNorms(
            matrix / self.norms.matrix,
            output / self.norms.output if self.norms.output else 0.0,
        )

    def error(self, batch: list[int], weights: Weights) -> Tensor:
        with torch.no_grad():
            reference = self.call(batch)
        pruned = self.call(batch, weights)
        total = attention_error(
            reference,
            pruned.query,
            pruned.key,
            matrix_weight=self.matrix_weight,
            output_weight=self.output_weight,
            output_projection=self.output_projection(),
        )
        return total / len(batch)

    def curvature(self) -> Curvature:
        generator = torch.Generator(self.replica.device).manual_seed(0)
        hessians: dict[Role, Tensor] = {}
        sensitivities: dict[Role, Tensor] = {}
        for batch in self.batches(range(len(self.inputs))):
            call, linears = self._recorded_call(batch)
            gradients = self._probe(call, linears, generator)
            for role in self.roles:
                projection = self.projections[role]
                x = linears[projection.child][0].flatten(0, -2)
                heads = (call.query if role == "q" else call.key).shape[1]
                gradient = gradients[projection.child][..., projection.rows]
                by_head = gradient.flatten(0, -2).unflatten(-1, (heads, -1))
                by_head = by_head.transpose(0, 1)
                _add(sensitivities, role, by_head.mT @ by_head)
                _add(hessians, role, x.T @ x)
        return {role: (hessians[role], sensitivities[role]) for role in self.roles}

    def _probe(
        self,
        call: AttentionCall,
        linears: Mapping[str, tuple[Tensor, Tensor]],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Gradients of a random projection of the error's inside, by Linear."""
        with torch.no_grad():
            gradients = probe_gradients(
                call,
                generator,
                matrix_weight=self.matrix_weight,
                output_weight=self.output_weight,
                output_projection=self.output_projection(),
            )
        reached = [
            (tensor, gradient)
            for tensor, gradient in zip((call.query, call.key), gradients, strict=True)
            if tensor.requires_grad  # not if only the other one is pruned
        ]
        tensors, upstream = zip(*reached, strict=True)
        outputs = [output for _, output in linears.values()]
        found = torch.autograd.grad(tensors, outputs, upstream, materialize_grads=True)
        return dict(zip(linears, found, strict=True))


class OutputObjective(Objective):
    """Of v and o.

    :param pruned: weights of q and k that are pruned already
    """

    def __init__(
        self,
        replica: AttentionReplica,
        inputs: ModuleInputs,
        projections: Mapping[Role, Projection],
        roles: Sequence[Role],
        pruned: Weights,
    ):
        super().__init__(replica, inputs, projections, roles)
        self.pruned = dict(pruned)
        total = sum(
            self._output(super(OutputObjective, self).call(batch)).square().sum().item()
            for batch in self.batches(self.held_back)
        )
        self.weight = len(self.held_back) / total if total else 0.0

    def call(self, batch: list[int], weights: Weights | None = None) -> AttentionCall:
        return super().call(batch, self.pruned | dict(weights or {}))

    @torch.no_grad()
    def _output(self, call: AttentionCall) -> Tensor:
        return attention_context(call, call.value) @ self.output_projection().T

    def error(self, batch: list[int], weights: Weights) -> Tensor:
        with torch.no_grad():
            reference = self._output(super().call(batch))
        pruned = self.call(batch, {r: w for r, w in weights.items() if r != "o"})
        context = attention_context(pruned, pruned.value)
        output = context @ weights.get("o", self.output_projection()).T
        return (output - reference).square().sum() * (self.weight / len(batch))

    def curvature(self) -> Curvature:
        """See the base class; v is seen through A~ and W_o, o's inputs are A~ V."""
        hessians: dict[Role, Tensor] = {}
        heads = 1
        for batch in self.batches(range(len(self.inputs))):
            for sample in batch:  # heads times as much as the hidden states
                call, linears = self._recorded_call([sample])
                heads, groups = call.query.shape[1], call.key.shape[1]
                with torch.no_grad():
                    for role in self.roles:
                        if role == "o":
                            x = attention_context(call, call.value)
                        else:
                            x = linears[self.projections[role].child][0]
                            shared = x[:, None].expand(-1, groups, -1, -1)
                            x = attention_context(call, shared).unflatten(
                                -1, (heads, -1)
                            )
                        x = x.flatten(0, -2)
                        _add(hessians, role, x.T @ x)
        found: Curvature = {}
        for role in self.roles:
            found[role] = (hessians[role], None)
            if role == "v":
                by_head = self.output_projection().unflatten(
                    -1, (groups, heads // groups, -1)
                )
                found[role] = (
                    hessians[role],
                    torch.einsum("dgha,dghb->gab", by_head, by_head),
                )
        return found


def _add(sums: dict[Role, Tensor], role: Role, term: Tensor) -> None:
    sums[role] = sums[role] + term if role in sums else term
