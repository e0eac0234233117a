"""Random 2:4 weights and tokens for the kernels."""

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import bits_of

DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


def random_values(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def random_2of4(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Keep two of four at random indices; a few kept values are zeros themselves."""
    weight = random_values((rows, columns), dtype)
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    pruned = (order < 2).view(rows, columns) | (torch.rand(rows, columns) < 0.05)
    return bits_of(weight).masked_fill(pruned, 0).view(dtype)
