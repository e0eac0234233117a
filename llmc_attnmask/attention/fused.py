"""The attention error and its gradient on a GPU, without writing an L x L matrix.

What ``matrix.py`` computes in blocks of query rows, here in tiles that never leave the
chip. With A = exp(S - m) / l row by row, G = dE/dA~ and delta = rowsum(A~ o G):

1. ``statistics``: m and l of the dense and of the pruned logits in one pass over the
   keys (online softmax).
2. ``change``: ||A~ - A||_F^2, (A~ - A) V, A~ V and rowsum(A~ o (A~ - A)).
3. Outside: what (A~ - A) V becomes behind W_o, its gradient U and delta.
4. ``query_gradient`` and ``key_gradient``: P = A~ o (G - delta) with
   G = 2 w_A (A~ - A) + U V^T, dE/dQ~ = scaling * P K~ and dE/dK~ = scaling * P^T Q~.

The differences A~ - A are taken tile by tile, not from sums of squares: at the end of a
run they are a thousandth of A, and sums of squares would leave nothing of them.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from llmc_attnmask.attention import fused_kernels as kernels
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.visibility import key_ranges

# One stage: pipelined, float32 heads of 128 would not fit an A100's shared memory.
_LAUNCH: dict[str, Any] = {"num_warps": 4, "num_stages": 1}


def error_and_gradient(
    reference: AttentionCall,
    query: Tensor,
    key: Tensor,
    matrix_weight: float,
    output_weight: float,
    output_projection: Tensor | None,
    need_gradient: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``attention_error`` and its gradients; see there for the arguments.

    :return: scalar and, if needed, [B, H, L, dh] and [B, G, L, dh], all float32
    """
    problem = _Problem(reference, query, key, matrix_weight)
    error, reached, context, inner = problem.change(bool(output_weight))
    error = matrix_weight * error
    upstream = None
    delta = (2 * matrix_weight) * inner
    if output_weight:
        assert output_projection is not None
        projection = output_projection.float()
        output = reached.transpose(1, 2).flatten(2) @ projection.T  # [B, L, D]
        error = error + output_weight * output.square().sum()
        back = (2 * output_weight) * output @ projection
        upstream = back.unflatten(-1, (query.shape[1], -1)).transpose(1, 2).contiguous()
        delta = delta + (upstream * context).sum(-1)
    if not need_gradient:
        return error, None
    return error, problem.gradients(upstream, delta)


def tile_size(width: int) -> int:
    """Rows and columns of a tile of A, by head dimension: what shared memory holds."""
    return 32 if width <= 128 else 16


class _Problem:
    """Arguments that the kernels share."""

    def __init__(
        self, call: AttentionCall, query: Tensor, key: Tensor, matrix_weight: float
    ):
        self.batch, self.heads, self.length, width = query.shape
        self.groups, self.keys = key.shape[1:3]
        self.tensors = [
            tensor.detach().contiguous()
            for tensor in (call.query, query, call.key, key, call.value)
        ]
        tile = tile_size(width)
        self.blocks = triton.cdiv(self.length, tile)
        self.ranges = key_ranges(call, tile).to(torch.int32).contiguous()
        sinks, mask = call.sinks, call.mask
        shape = (self.batch, self.heads, self.length, self.keys)
        strides = (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
        self.statistics = query.new_empty(
            (4, self.batch, self.heads, self.length), dtype=torch.float32
        )
        self.scalars = (call.scaling, call.softcap or 1.0, matrix_weight)
        self.shape = (self.heads, self.groups, self.length, self.keys)
        self.mask = self.ranges if mask is None else mask, *strides
        self.sizes: dict[str, Any] = {
            "dh": width,
            "dv": call.value.shape[-1],
            "WIDTH": max(16, triton.next_power_of_2(width)),
            "VALUE_WIDTH": max(16, triton.next_power_of_2(call.value.shape[-1])),
            "ROWS": tile,
            "COLUMNS": tile,
            "MASKED": mask is not None,
            "CAPPED": call.softcap is not None,
        }
        launch = (*self._common(), self.ranges if sinks is None else sinks)
        kernels.statistics[self.blocks, self.batch * self.heads](
            *launch, HAS_SINKS=sinks is not None, **self.sizes, **_LAUNCH
        )

    def _common(self) -> tuple[Any, ...]:
        return (
            *self.tensors,
            self.statistics,
            self.ranges,
            *self.mask,
            *self.scalars,
            *self.shape,
        )

    def change(self, with_output: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """||A~ - A||_F^2, (A~ - A) V, A~ V and rowsum(A~ o (A~ - A))."""
        per_row = self.statistics.new_empty(2, self.batch, self.heads, self.length)
        contexts = self.statistics.new_empty(
            (2, self.batch, self.heads, self.length, self.sizes["dv"])
            if with_output
            else (2,)
        )
        kernels.change[self.blocks, self.batch * self.heads](
            *self._common(),
            per_row,
            contexts,
            OUTPUT=with_output,
            **self.sizes,
            **_LAUNCH,
        )
        return per_row[0].sum(), contexts[0], contexts[1], per_row[1]

    def gradients(
        self, upstream: Tensor | None, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dE/dQ~ and dE/dK~.

        :param upstream: U, [B, H, L, dv]
        :param delta: [B, H, L]
        """
        to_query = torch.zeros_like(self.tensors[1], dtype=torch.float32)
        to_key = torch.zeros_like(self.tensors[3], dtype=torch.float32)
        given = (delta if upstream is None else upstream, delta.contiguous())
        flags: dict[str, Any] = {"OUTPUT": upstream is not None, **self.sizes}
        kernels.query_gradient[self.blocks, self.batch * self.heads](
            *self._common(), *given, to_query, **flags, **_LAUNCH
        )
        kernels.key_gradient[
            triton.cdiv(self.keys, self.sizes["COLUMNS"]), self.batch * self.groups
        ](*self._common(), *given, to_key, **flags, **_LAUNCH)
        return to_query, to_key
