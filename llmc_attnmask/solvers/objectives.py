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
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionCall, AttentionReplica
from llmc_attnmask.attention.matrix import (
    AttentionNorms,
    attention_changes,
    attention_context,
    attention_error,
    attention_norms,
    probe_gradients,
)
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.memory import MicroBatchRunner
from llmc_attnmask.calibration.micro_batches import (
    MAX_MICRO_BATCH,
    MicroBatch,
    Sums,
    count,
    micro_batches_of,
    train_validation_split,
)
from llmc_attnmask.distributed import all_sum_numbers

Weights = Mapping[Role, Tensor]  # projection -> weight [rows, columns]
Curvature = dict[Role, tuple[Tensor, Tensor | None]]  # H and G, see ``curvature``


class Objective(ABC):
    """Error of one attention layer as a function of some projections' weights.

    :param replica: the attention module, with its dense weights
    :param inputs: calibration inputs of the module, at least one sample
    :param projections: all of q, k, v, o
    :param roles: the projections whose weights are sought
    :param batch_size: samples per step of a descent
    """

    def __init__(
        self,
        replica: AttentionReplica,
        inputs: ModuleInputs,
        projections: Mapping[Role, Projection],
        roles: Sequence[Role],
        batch_size: int = MAX_MICRO_BATCH,
    ):
        self.replica, self.inputs = replica, inputs
        self.projections, self.roles = projections, list(roles)
        self.micro_batches = micro_batches_of(inputs, batch_size)
        self.train, self.validation = train_validation_split(self.micro_batches)
        self.runner = MicroBatchRunner()

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
    def error(self, samples: list[int], weights: Weights) -> Tensor:
        """Sum of some samples' relative errors, differentiable in the weights."""

    @torch.no_grad()
    def validation_error(self, weights: Weights) -> float:
        """Mean relative error of the held-back samples of all ranks."""

        def run(samples: list[int]) -> float:
            return self.error(samples, weights).item()

        total = sum(error for _, error in self.runner(self.validation, run))
        return all_sum_numbers(total)[0] / count(self.validation)

    def gradient(
        self, micro_batches: Iterable[MicroBatch], weights: Weights
    ) -> tuple[float, dict[Role, Tensor]]:
        """Mean relative error of some units' samples and its gradient, [rows, columns].

        It is that of all ranks, each of which evaluates the units that it has.
        """
        micro_batches = list(micro_batches)
        leaves = {r: w.detach().requires_grad_() for r, w in weights.items()}

        def run(samples: list[int]) -> tuple[float, tuple[Tensor, ...]]:
            with torch.enable_grad():
                error = self.error(samples, leaves)
            return error.item(), torch.autograd.grad(error, list(leaves.values()))

        total, sums = 0.0, Sums(like=leaves)
        for _, (error, gradients) in self.runner(micro_batches, run):
            total += error
            for role, gradient in zip(leaves, gradients, strict=True):
                sums.add(role, gradient)
        mean = all_sum_numbers(total)[0] / count(micro_batches)
        return mean, {r: g.div_(count(micro_batches)) for r, g in sums.totals().items()}

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
        batch_size: int = MAX_MICRO_BATCH,
    ):
        super().__init__(replica, inputs, projections, roles, batch_size)

        def run(samples: list[int]) -> AttentionNorms:
            return attention_norms(self.call(samples), self.output_projection())

        norms = [found for _, found in self.runner(self.validation, run)]
        matrix, output = all_sum_numbers(
            sum(found.matrix for found in norms), sum(found.output for found in norms)
        )
        self.norms = AttentionNorms(matrix, output)
        self.matrix_weight = (1 - output_weight) * count(self.validation) / matrix
        # an output projection of zeros lets no error through
        share = output_weight / output if output else 0.0
        self.output_weight = share * count(self.validation)

    @torch.no_grad()
    def validation_errors(self, candidates: Sequence[Weights]) -> list[AttentionNorms]:
        """The two errors of the formula, each relative, before they are weighed."""

        def run(samples: list[int]) -> list[AttentionNorms]:
            pruned = [self.call(samples, weights) for weights in candidates]
            projection = self.output_projection()
            return attention_changes(self.call(samples), pruned, projection)

        found = [changes for _, changes in self.runner(self.validation, run)]
        relative: list[AttentionNorms] = []
        for i in range(len(candidates)):  # also where this rank holds none back
            sums = all_sum_numbers(
                sum(changes[i].matrix for changes in found),
                sum(changes[i].output for changes in found),
            )
            pairs = zip(sums, self.norms, strict=True)
            relative.append(AttentionNorms(*(x / n if n else 0.0 for x, n in pairs)))
        return relative

    def error(self, samples: list[int], weights: Weights) -> Tensor:
        with torch.no_grad():
            reference = self.call(samples)
        pruned = self.call(samples, weights)
        return attention_error(
            reference,
            pruned.query,
            pruned.key,
            matrix_weight=self.matrix_weight,
            output_weight=self.output_weight,
            output_projection=self.output_projection(),
        )

    def curvature(self) -> Curvature:
        generator = torch.Generator(self.replica.device)
        hessians: Sums[Role] = Sums()
        sensitivities: Sums[Role] = Sums()
        for micro_batch in self.micro_batches:
            generator.manual_seed(micro_batch.index)  # the same signs on whatever rank
            for _, terms in self.runner(
                [micro_batch], lambda b: self._terms(b, generator)
            ):
                for role, (hessian, sensitivity) in terms.items():
                    hessians.add(role, hessian)
                    sensitivities.add(role, sensitivity)
        inputs, outputs = hessians.totals(), sensitivities.totals()
        return {role: (inputs[role], outputs[role]) for role in self.roles}

    def _terms(
        self, samples: list[int], generator: torch.Generator
    ) -> dict[Role, tuple[Tensor, Tensor]]:
        """Some samples' share of H and G."""
        call, linears = self._recorded_call(samples)
        gradients = self._probe(call, linears, generator)
        terms: dict[Role, tuple[Tensor, Tensor]] = {}
        for role in self.roles:
            projection = self.projections[role]
            x = linears[projection.child][0].flatten(0, -2)
            heads = (call.query if role == "q" else call.key).shape[1]
            gradient = gradients[projection.child][..., projection.rows]
            by_head = gradient.flatten(0, -2).unflatten(-1, (heads, -1))
            by_head = by_head.transpose(0, 1)
            terms[role] = x.T @ x, by_head.mT @ by_head
        return terms

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
        batch_size: int = MAX_MICRO_BATCH,
    ):
        super().__init__(replica, inputs, projections, roles, batch_size)
        self.pruned = dict(pruned)

        def run(samples: list[int]) -> float:
            dense = super(OutputObjective, self).call(samples)
            return self._output(dense).square().sum().item()

        norms = sum(norm for _, norm in self.runner(self.validation, run))
        (total,) = all_sum_numbers(norms)
        self.weight = count(self.validation) / total if total else 0.0

    def call(self, samples: list[int], weights: Weights | None = None) -> AttentionCall:
        return super().call(samples, self.pruned | dict(weights or {}))

    @torch.no_grad()
    def _output(self, call: AttentionCall) -> Tensor:
        return attention_context(call, call.value) @ self.output_projection().T

    def error(self, samples: list[int], weights: Weights) -> Tensor:
        with torch.no_grad():
            reference = self._output(super().call(samples))
        pruned = self.call(samples, {r: w for r, w in weights.items() if r != "o"})
        context = attention_context(pruned, pruned.value)
        output = context @ weights.get("o", self.output_projection()).T
        return (output - reference).square().sum() * self.weight

    def curvature(self) -> Curvature:
        """See the base class; v is seen through A~ and W_o, o's inputs are A~ V."""
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
                by_head = self.output_projection().unflatten(
                    -1, (groups, heads // groups, -1)
                )
                found[role] = (
                    hessian,
                    torch.einsum("dgha,dghb->gab", by_head, by_head),
                )
        return found

    def _terms(self, samples: list[int]) -> list[tuple[Role, Tensor]]:
        """Every sample's own H: that of v takes heads times the hidden states."""
        terms: list[tuple[Role, Tensor]] = []
        for sample in samples:
            call, linears = self._recorded_call([sample])
            heads, groups = call.query.shape[1], call.key.shape[1]
            with torch.no_grad():
                for role in self.roles:
                    if role == "o":
                        x = attention_context(call, call.value)
                    else:
                        x = linears[self.projections[role].child][0]
                        shared = x[:, None].expand(-1, groups, -1, -1)
                        x = attention_context(call, shared).unflatten(-1, (heads, -1))
                    x = x.flatten(0, -2)
                    terms.append((role, x.T @ x))
        return terms
