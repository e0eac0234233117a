"""An attention layer to prune: its module, inputs and projections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmc_attnmask.attention.capture import AttentionCall, AttentionReplica
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.calibration.inputs import ModuleInputs

Weights = Mapping[Role, Tensor]  # projection -> weight [rows, columns]


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module, its calibration inputs, and where its projections are."""

    replica: AttentionReplica  # with the dense weights
    inputs: ModuleInputs  # its calibration inputs, at least one sample
    projections: Mapping[Role, Projection]  # of q, k, v, o, all that it contains

    def dense(self, role: Role) -> Tensor:
        """Return the dense weight of a projection [rows, columns]."""
        projection = self.projections[role]
        weight = self.replica.module.get_parameter(projection.parameter)
        return projection.of(weight.detach())

    def output_projection(self) -> Tensor:
        """Return W_o [D, H * dv], or the identity if the module does not contain it."""
        if "o" in self.projections:
            return self.dense("o")
        value = self.dense("v")
        return torch.eye(len(value), dtype=value.dtype, device=value.device)

    def call(
        self, samples: Sequence[int], weights: Weights | None = None
    ) -> AttentionCall:
        """Return the softmax's inputs, with some projections' weights replaced."""
        args, kwargs = self.inputs.batch(
            samples, self.replica.device, self.replica.dtype
        )
        return self.replica(args, kwargs, self._parameters(weights or {}))

    def _parameters(self, weights: Weights) -> dict[str, Tensor]:
        """Return the Linears' weights with the projections' rows replaced."""
        parameters: dict[str, Tensor] = {}
        for role, weight in weights.items():
            projection = self.projections[role]
            name = projection.parameter
            if name not in parameters:
                parameter = self.replica.module.get_parameter(name)
                parameters[name] = parameter.detach().clone()
            projection.put(parameters[name], weight)
        return parameters
