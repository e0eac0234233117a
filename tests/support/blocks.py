"""Blocks to recover, dense and pruned, with the inputs that reach them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.masks.structure import MaskStructure
from llmc_attnmask.recovery.block import Block, BlockPair

TWO_OF_FOUR = MaskStructure.parse("2:4")


def case_of(model: PreTrainedModel, tokens: Tensor, index: int = 1) -> BlockPair:
    """Return the block at an index; its predecessors are pruned, too."""
    block = model.model.layers[index]
    with torch.no_grad():
        stream = inputs_of(model, block, tokens)
        dense_state = {k: v.clone() for k, v in block.state_dict().items()}
        kept = {}
        for layer in model.model.layers[: index + 1]:
            for name, linear in layer.named_modules():
                if isinstance(linear, torch.nn.Linear):
                    kept[name] = TWO_OF_FOUR.mask(linear.weight.abs(), 0.5)
                    linear.weight.masked_fill_(~kept[name], 0.0)
        inputs = inputs_of(model, block, tokens)
    device = torch.device("cpu")
    dense = Block(block, inputs, device, stream.hidden, dense_state)
    targets = dense.outputs()
    pruned = Block(block, inputs, device)
    return BlockPair(dense, pruned, targets, kept)


def with_massive_channel(pair: BlockPair, samples: Sequence[int]) -> BlockPair:
    """Make a channel massive, to an extent that differs from sample to sample."""
    targets = []
    for sample, target in zip(samples, pair.targets, strict=True):
        scale = torch.ones(target.shape[-1])
        scale[5] = 40.0 * (1 + sample)
        targets.append(target * scale)
    return replace(pair, targets=targets)


def inputs_of(
    model: PreTrainedModel, block: torch.nn.Module, tokens: Tensor
) -> ModuleInputs:
    """Return what reaches a block of a model."""
    inputs = ModuleInputs()
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args, kwargs), with_kwargs=True
    )
    model(input_ids=tokens, use_cache=False)
    handle.remove()
    return inputs
