"""The relaxed mask: entries in (0, 1) that sum to the number kept in each group.

The paper's M is in [0, 1]^{d x d}. Here it is the most even such matrix for the scores
s at a temperature T,

    m_i = sigmoid((s_i - tau) / T),   tau such that sum_i m_i = k in every group,

which maximizes <s, m> + T * entropy(m) over the hypersimplex. At a high temperature it
is even; at a low one, it is the hard top-k mask.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ITERATIONS = 40
_TOLERANCE = 1e-4


def soft_top_k(scores: Tensor, kept: int, temperature: float) -> Tensor:
    """Return the relaxed mask of each row, differentiable in the scores.

    :param scores: [groups, entries]
    :param kept: entries to keep in each group
    :return: [groups, entries], in [0, 1]; each row sums to ``kept``
    """
    if kept in (0, scores.shape[-1]):  # nothing to choose
        return torch.full_like(scores, float(kept > 0))
    return _SoftTopK.apply(scores, kept, temperature)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int, temperature: float) -> Tensor:
        scaled = scores / temperature
        relaxed = torch.sigmoid(scaled - _threshold(scaled, kept))
        ctx.save_for_backward(relaxed)
        ctx.temperature = temperature
        return relaxed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        # tau moves with the scores: the implicit function theorem on sum_i m_i = k
        (relaxed,) = ctx.saved_tensors
        slope = relaxed * (1 - relaxed)
        total = slope.sum(-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        mean = (slope * upstream).sum(-1, keepdim=True) / total
        return slope * (upstream - mean) / ctx.temperature, None, None


def _threshold(scaled: Tensor, kept: int) -> Tensor:
    """Find tau of each group by Newton's method inside a shrinking bracket."""
    entries = scaled.shape[-1]
    even = torch.logit(torch.tensor(kept / entries, dtype=torch.float64)).item()
    low = scaled.amin(-1) - even  # here every m_i >= k/n, so the sum is too large
    high = scaled.amax(-1) - even
    # start between the k-th and the (k+1)-th score: exact in the low-temperature limit
    top = scaled.topk(kept + 1, -1).values
    tau = top[:, kept - 1 :].mean(-1).clamp(low, high)
    by_entry = scaled.T.contiguous()  # as sums over a short last dimension are slow
    for _ in range(_ITERATIONS):
        relaxed = torch.sigmoid(by_entry - tau)
        excess = relaxed.sum(0) - kept
        if excess.abs().amax() < _TOLERANCE * kept:
            break
        above = excess > 0
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
        slope = (relaxed - relaxed.square()).sum(0)
        newton = tau + excess / slope
        inside = (newton >= low) & (newton <= high)  # False for NaN and infinity
        tau = torch.where(inside, newton, (low + high) / 2)
    return tau.unsqueeze(-1)
