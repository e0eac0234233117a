"""llm-compressor's SparseGPT on one weight, for comparison."""

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as upstream
from torch import Tensor, nn

from llmc_attnmask.masks.structure import MaskStructure


def sparsegpt_weight(
    weight: Tensor, hessian: Tensor, structure: MaskStructure, sparsity: float
) -> Tensor:
    """Return the pruned, updated weight [rows, columns] for the modifier's defaults."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    _, pruned = upstream.sparsify_weight(
        module=linear,
        hessians_dict={linear: hessian.clone()},  # it is changed in place
        sparsity=sparsity,
        prune_n=structure.pruned,
        prune_m=structure.group,
        block_size=128,
        dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )
    return torch.as_tensor(pruned)
