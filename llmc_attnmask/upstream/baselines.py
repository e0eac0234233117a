"""Prune the same weights with other methods, with which the report compares.

Wanda and SparseGPT are llm-compressor's own code, with its default fields. It is
imported by the functions, because importing it imports the modifiers, which import this
module.
"""

from collections.abc import Callable
from functools import partial

from loguru import logger
from torch import Tensor, nn

from llmc_attnmask.masks.structure import MaskStructure


def baselines(
    structure: MaskStructure, sparsity: float
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Map names to functions of a dense weight [rows, columns] and X^T X.

    X^T X is [columns, columns]. Each function returns the pruned weight and leaves its
    arguments unchanged.
    """
    problem = (structure, sparsity)
    return {
        "magnitude": partial(_magnitude, *problem),
        "Wanda": partial(_wanda, *problem),
        "SparseGPT": partial(_sparsegpt, *problem),
    }


def _magnitude(
    structure: MaskStructure, sparsity: float, weight: Tensor, _: Tensor
) -> Tensor:
    return weight.masked_fill(~structure.mask(weight.abs(), sparsity), 0.0)


def _wanda(
    structure: MaskStructure, sparsity: float, weight: Tensor, hessian: Tensor
) -> Tensor:
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    linear = _linear(weight)
    return wanda_sparsify.sparsify_weight(
        module=linear,
        row_scalars_dict={linear: hessian.diagonal()},
        sparsity=sparsity,
        prune_n=structure.pruned,
        prune_m=structure.group,
    )


def _sparsegpt(
    structure: MaskStructure, sparsity: float, weight: Tensor, hessian: Tensor
) -> Tensor:
    from llmcompressor.modifiers.pruning.sparsegpt import (
        SparseGPTModifier,
        sgpt_sparsify,
    )

    linear = _linear(weight)
    fields = SparseGPTModifier.model_fields
    # its advice is for users of SparseGPTModifier
    logger.disable(sgpt_sparsify.__name__)
    try:
        _, pruned = sgpt_sparsify.sparsify_weight(
            module=linear,
            hessians_dict={linear: hessian.clone()},  # it is inverted in place
            sparsity=sparsity,
            prune_n=structure.pruned,
            prune_m=structure.group,
            block_size=fields["block_size"].default,
            dampening_frac=fields["dampening_frac"].default,
            preserve_sparsity_mask=False,
        )
    finally:
        logger.enable(sgpt_sparsify.__name__)
    return pruned


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
