"""What the journal records about a pruned attention module, for the report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmc_attnmask.attention.attention_maps import (
    attention_maps,
    heads_of,
    zeros_by_head,
)
from llmc_attnmask.attention.capture import AttentionCall, AttentionReplica
from llmc_attnmask.attention.projections import Projection, Role
from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.solvers.solver import MaskSolution


def measurements(
    replica: AttentionReplica,
    inputs: ModuleInputs,
    projections: Mapping[Role, Projection],
    solutions: Sequence[MaskSolution],
    with_maps: bool,
) -> dict[str, Any]:
    """Measurements as JSON values, described in the report's schema.

    :param replica: the attention module, with its dense weights
    :param inputs: its calibration inputs, at least one sample
    :param with_maps: whether to include attention maps
    """
    masks: dict[Role, Tensor] = {}
    weights: dict[Role, Tensor] = {}
    for solution in solutions:
        masks |= solution.masks
        weights |= solution.weights
    calls = _calls(replica, inputs, projections, weights)
    heads = heads_of(calls[0])
    return {
        "zeros": sum(int((~mask).sum()) for mask in masks.values()),
        "entries": sum(mask.numel() for mask in masks.values()),
        "samples": int(all_sum_numbers(len(inputs))[0]),
        "curves": {joined(s.masks): s.curve for s in solutions},
        "compared": {
            method: errors._asdict()
            for solution in solutions
            for method, errors in solution.compared.items()
        },
        "zeros_by_head": {
            role: zeros_by_head(role, mask, heads[role]) for role, mask in masks.items()
        },
        "pictures": [p.encode() for p in attention_maps(*calls)] if with_maps else [],
    }


def joined(roles: Iterable[str]) -> str:
    """Names of projections as one name, such as "q and k"."""
    return " and ".join(roles)


@torch.no_grad()
def _calls(
    replica: AttentionReplica,
    inputs: ModuleInputs,
    projections: Mapping[Role, Projection],
    weights: Mapping[Role, Tensor],
) -> tuple[AttentionCall, AttentionCall]:
    """The inputs of the dense and of the pruned softmax, for the last sample."""
    args, kwargs = inputs.batch([len(inputs) - 1], replica.device, replica.dtype)
    parameters: dict[str, Tensor] = {}
    for role in ("q", "k"):
        if role not in weights:
            continue
        projection = projections[role]
        name = projection.parameter
        if name not in parameters:
            parameters[name] = replica.module.get_parameter(name).detach().clone()
        projection.put(parameters[name], weights[role])
    return replica(args, kwargs), replica(args, kwargs, parameters)
