"""Scales of quantized weights."""

import torch
from torch import Tensor


def by_row(scale: Tensor, widths: list[int]) -> Tensor:
    """Expand scales, given per row or per part of a fused layer, to float32 [rows].

    :param widths: rows of every part
    """
    if scale.numel() == len(widths) != sum(widths):
        counts = torch.tensor(widths, device=scale.device)
        scale = scale.view(-1).repeat_interleave(counts)
    return scale.float().reshape(-1).contiguous()
