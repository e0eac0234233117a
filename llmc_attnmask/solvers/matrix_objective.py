"""The error on which the masks of q and k are learned; formula: ``objective.py``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.matrix import (
    AttentionNorms,
    attention_changes,
    attention_error,
    attention_norms,
    probe_gradients,
)
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.calibration.micro_batches import MAX_MICRO_BATCH, Sums, sample_count
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.solvers.attention_layer import AttentionLayer, Weights
from llmc_attnmask.solvers.objective import Curvature, Objective

OUTPUT_WEIGHT = 0.9  # the default w of the formula


class MatrixObjective(Objective):
    """The objective for q and k.

    :param output_weight: w of the formula
    """

    def __init__(
        self,
        layer: AttentionLayer,
        roles: Sequence[Role],
        output_weight: float,
        batch_size: int = MAX_MICRO_BATCH,
    ):
        super().__init__(layer, roles, batch_size)

        def run(samples: list[int]) -> AttentionNorms:
            return attention_norms(self.call(samples), self.layer.output_projection())

        norms = [found for _, found in self.runner(self.validation, run)]
        matrix, output = all_sum_numbers(
            sum(found.matrix for found in norms), sum(found.output for found in norms)
        )
        self.norms = AttentionNorms(matrix, output)
        number = sample_count(self.validation)
        self.matrix_weight = (1 - output_weight) * number / matrix
        # through an output projection of zeros no error reaches the output
        share = output_weight / output if output else 0.0
        self.output_weight = share * number

    @torch.no_grad()
    def validation_errors(self, candidates: Sequence[Weights]) -> list[AttentionNorms]:
        """Return the formula's two relative errors, unweighted, for each candidate."""

        def run(samples: list[int]) -> list[AttentionNorms]:
            pruned = [self.call(samples, weights) for weights in candidates]
            projection = self.layer.output_projection()
            return attention_changes(self.call(samples), pruned, projection)

        found = [changes for _, changes in self.runner(self.validation, run)]
        relative: list[AttentionNorms] = []
        for i in range(len(candidates)):  # also if this rank has no validation samples
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
            output_projection=self.layer.output_projection(),
        )

    def curvature(self) -> Curvature:
        generator = torch.Generator(self.layer.replica.device)
        hessians: Sums[Role] = Sums()
        sensitivities: Sums[Role] = Sums()
        for micro_batch in self.micro_batches:
            # the same signs, whichever rank has the micro-batch
            generator.manual_seed(micro_batch.index)
            for _, terms in self.runner(
                [micro_batch], lambda samples: self._terms(samples, generator)
            ):
                for role, (hessian, sensitivity) in terms.items():
                    hessians.add(role, hessian)
                    sensitivities.add(role, sensitivity)
        inputs, outputs = hessians.totals(), sensitivities.totals()
        return {role: (inputs[role], outputs[role]) for role in self.roles}

    def _terms(
        self, samples: list[int], generator: torch.Generator
    ) -> dict[Role, tuple[Tensor, Tensor]]:
        """Return what some samples contribute to H and G."""
        call, linears = self._recorded_call(samples)
        gradients = self._probe(call, linears, generator)
        terms: dict[Role, tuple[Tensor, Tensor]] = {}
        for role in self.roles:
            projection = self.layer.projections[role]
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
        """Return gradients, by Linear, of a random projection of the norms' content."""
        with torch.no_grad():
            gradients = probe_gradients(
                call,
                generator,
                matrix_weight=self.matrix_weight,
                output_weight=self.output_weight,
                output_projection=self.layer.output_projection(),
            )
        reached = [
            (tensor, gradient)
            for tensor, gradient in zip((call.query, call.key), gradients, strict=True)
            if tensor.requires_grad  # False if only the other one is pruned
        ]
        tensors, upstream = zip(*reached, strict=True)
        outputs = [output for _, output in linears.values()]
        found = torch.autograd.grad(tensors, outputs, upstream, materialize_grads=True)
        return dict(zip(linears, found, strict=True))
