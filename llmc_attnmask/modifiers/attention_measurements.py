"""Measure a pruned attention module for the journal, from which the report is made."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmc_attnmask.attention.attention_maps import (
    attention_maps,
    heads_of,
    zeros_by_head,
)
from llmc_attnmask.attention.projections import Role
from llmc_attnmask.distributed import all_sum_numbers
from llmc_attnmask.solvers.attention_layer import AttentionLayer
from llmc_attnmask.solvers.solver import MaskSolution, combined


@torch.no_grad()
def measurements(
    layer: AttentionLayer, solutions: Sequence[MaskSolution], with_maps: bool
) -> dict[str, Any]:
    """Return the measurements as JSON values; the report's schema describes them.

    :param with_maps: whether to include attention maps
    """
    masks, weights = combined(solutions)
    last = [len(layer.inputs) - 1]  # the sample whose attention maps are shown
    query_and_key: dict[Role, Tensor] = {
        role: weight for role, weight in weights.items() if role in ("q", "k")
    }
    dense, pruned = layer.call(last), layer.call(last, query_and_key)
    heads = heads_of(dense)
    maps = attention_maps(dense, pruned) if with_maps else []
    return {
        "zeros": sum(int((~mask).sum()) for mask in masks.values()),
        "entries": sum(mask.numel() for mask in masks.values()),
        "samples": int(all_sum_numbers(len(layer.inputs))[0]),
        "curves": {joined(s.masks): s.curve for s in solutions},
        "compared": {
            method: errors._asdict()
            for solution in solutions
            for method, errors in solution.compared.items()
        },
        "zeros_by_head": {
            role: zeros_by_head(role, mask, heads[role]) for role, mask in masks.items()
        },
        "pictures": [attention_map.encode() for attention_map in maps],
    }


def joined(roles: Iterable[str]) -> str:
    """Join names of projections into one, such as "q and k"."""
    return " and ".join(roles)
