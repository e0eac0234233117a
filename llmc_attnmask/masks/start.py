"""Where learning starts: Wanda's scores, SparseGPT's mask and weights.

Both look at a Linear's inputs alone, through H = 2 X^T X over the calibration tokens.
"""

from collections.abc import Callable, Iterable

import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as upstream
from torch import Tensor, nn

from llmc_attnmask.attention.capture import AttentionInputs, AttentionReplica
from llmc_attnmask.masks.structure import MaskStructure

_SAMPLES_AT_ONCE = 8
# SparseGPTModifier's defaults
_BLOCK_SIZE = 128
_DAMPENING = 0.01


def input_hessians(
    replica: AttentionReplica, inputs: AttentionInputs, children: Iterable[str]
) -> dict[str, Tensor]:
    """2 X^T X of the named Linears' inputs, mean over the calibration samples.

    :return: child name -> [in-features, in-features]
    """
    sums: dict[str, Tensor] = {}

    def add(child: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            product = x.T @ x
            sums[child] = sums[child] + product if child in sums else product

        return hook

    handles = [
        replica.module.get_submodule(child).register_forward_pre_hook(add(child))
        for child in set(children)
    ]
    try:
        with torch.no_grad():
            for indices in inputs.batches(range(len(inputs)), _SAMPLES_AT_ONCE):
                replica(*inputs.batch(indices, replica.device, replica.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {child: total * (2 / len(inputs)) for child, total in sums.items()}


def wanda_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """|W| * ||x|| (arXiv 2306.11695), each row's mean brought to 1: [rows, columns]."""
    score = weight.abs() * hessian.diagonal().sqrt()
    return score / score.mean(-1, keepdim=True).clamp_min(1e-30)


def sparsegpt_weights(
    weight: Tensor, hessian: Tensor, structure: MaskStructure, sparsity: float
) -> Tensor:
    """Pruned and updated weights [rows, columns] by llm-compressor's SparseGPT."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    _, pruned = upstream.sparsify_weight(
        module=linear,
        hessians_dict={linear: hessian.clone()},  # it works in place
        sparsity=sparsity,
        prune_n=structure.pruned,
        prune_m=structure.group,
        block_size=_BLOCK_SIZE,
        dampening_frac=_DAMPENING,
        preserve_sparsity_mask=False,
    )
    return pruned
