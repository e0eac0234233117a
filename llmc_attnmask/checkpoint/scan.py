"""Read stored weights to find out how sparse they are."""

from math import prod

import torch

from llmc_attnmask.checkpoint.io.files import StoredTensor
from llmc_attnmask.checkpoint.layouts.bits import INTEGERS, matrix
from llmc_attnmask.checkpoint.layouts.sparse_24_bitmask import (
    NotTwoOfFourError,
    crowded_groups,
)


def is_two_of_four(tensor: StoredTensor) -> bool:
    """Return whether a stored weight [R, C] is 2:4; stop once it is not."""
    return tensor.shape[1] % 4 == 0 and not any(
        crowded_groups(matrix(block, tensor.shape[1], tensor.itemsize))
        for _, block in tensor.blocks(tensor.shape[1] * tensor.itemsize)
    )


def entries(tensor: StoredTensor) -> int:
    """Count the entries of a stored weight that are not +0.0."""
    return sum(
        int(torch.count_nonzero(block.view(INTEGERS[tensor.itemsize])))
        for _, block in tensor.blocks(tensor.itemsize)
    )


def zeros_at_start(tensor: StoredTensor) -> float:
    """Return the share of +0.0 in the first megabyte or so of a stored weight."""
    for _, block in tensor.blocks(tensor.itemsize):
        return float((block.view(INTEGERS[tensor.itemsize]) == 0).float().mean())
    return 0.0


def not_two_of_four(tensor: StoredTensor) -> NotTwoOfFourError:
    """Make the error that says how far a stored weight is from 2:4."""
    columns, size = tensor.shape[1], tensor.itemsize
    if columns % 4:
        found = f"its {columns} inputs are not divisible by 4"
    else:
        crowded = sum(
            crowded_groups(matrix(block, columns, size))
            for _, block in tensor.blocks(columns * size)
        )
        found = (
            f"{crowded} of its {prod(tensor.shape) // 4} groups of four inputs have "
            "more than two values that are not +0.0"
        )
        if negative := _negative_zeros(tensor):
            found += f" ({negative} entries are -0.0, as W * mask leaves them)"
    return NotTwoOfFourError(
        f"{tensor.name} in {tensor.file} is not 2:4: {found}; prune it, or pack only "
        "what is 2:4 with --only-2of4 (only_2of4=True), or zeros anywhere with "
        "--storage sparse-bitmask"
    )


def _negative_zeros(tensor: StoredTensor) -> int:
    if tensor.dtype.startswith("I"):
        return 0
    return sum(
        int((bits == torch.iinfo(bits.dtype).min).sum())
        for _, block in tensor.blocks(tensor.itemsize)
        for bits in [block.view(INTEGERS[tensor.itemsize])]
    )
