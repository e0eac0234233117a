"""The loss of a relaxed mask on a fused weight, and its closed-form gradient.

X [n, d] is the layer's input, W [d, d] = W_Q W_K^T the fused weight, M [d, d] the mask
in [0, 1], M_c [n, n] the causal mask. With

    A(W) = D^{-1} (exp(X W X^T) o M_c),   D the row sums,

    L(M) = 1/2 ||A(M o W) - A(W)||_F^2 + lambda/2 ||M||_F^2

and for F = A(M o W), C = F - A(W), P = F o C - diag((F o C) 1) F,

    dL/dM = W o (X^T P X) + lambda M.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def causal_attention(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return A(W), [n, n]: lower triangular, with rows that sum to 1.

    :param inputs: X [n, d]
    :param weight: W [d, d]
    """
    logits = inputs @ weight @ inputs.T
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


@dataclass(frozen=True)
class FusedProblem:
    """One instance of the problem; all tensors have one floating-point type."""

    inputs: Tensor  # X [n, d]
    weight: Tensor  # W [d, d]
    l2_penalty: float  # lambda

    def __post_init__(self) -> None:
        n, d = self.inputs.shape
        if self.weight.shape != (d, d):
            raise ValueError(
                f"weight is {tuple(self.weight.shape)}; expected {(d, d)} for inputs "
                f"of shape {(n, d)}"
            )

    def attention_error(self, weight: Tensor) -> Tensor:
        """Return ||A(W') - A(W)||_F^2 for any other fused weight W' [d, d]."""
        change = causal_attention(self.inputs, weight) - self._target()
        return change.square().sum()

    def loss(self, mask: Tensor) -> Tensor:
        """Return L(M), a scalar."""
        penalty = self.l2_penalty / 2 * mask.square().sum()
        return self.attention_error(mask * self.weight) / 2 + penalty

    def loss_and_gradient(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(M) and dL/dM [d, d]."""
        attention = causal_attention(self.inputs, mask * self.weight)  # F
        change = attention - self._target()  # C
        weighted = attention * change
        through_softmax = weighted - weighted.sum(-1, keepdim=True) * attention  # P
        by_weight = self.inputs.T @ through_softmax @ self.inputs
        gradient = self.weight * by_weight + self.l2_penalty * mask
        loss = (change.square().sum() + self.l2_penalty * mask.square().sum()) / 2
        return loss, gradient

    def _target(self) -> Tensor:
        return causal_attention(self.inputs, self.weight)
