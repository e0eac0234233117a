"""The attention error and its gradient on a GPU, without writing an L x L matrix.

What ``matrix.py`` computes in blocks of query rows is computed here in tiles that never
leave the chip. With A = exp(S - m) / l row by row, G = dE/dA~ and
delta = rowsum(A~ o G):

1. ``statistics``: m and l of the dense and of the pruned logits and A~ V in one pass
   over the keys (online softmax).
2. ``change``: ||A~ - A||_F^2, (A~ - A) V and rowsum(A~ o (A~ - A)).
3. Outside the kernels: (A~ - A) V times W_o, its gradient U, and delta.
4. ``query_gradient`` and ``key_gradient``: P = A~ o (G - delta) with
   G = 2 w_A (A~ - A) + U V^T, dE/dQ~ = scaling * P K~ and dE/dK~ = scaling * P^T Q~.

The differences A~ - A are taken tile by tile, not from sums of squares: at the end of a
run they are a thousandth of A, and rounding in sums of squares would cancel them out.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from llmc_attnmask.attention import fused_kernels as kernels
from llmc_attnmask.attention.capture import AttentionCall
from llmc_attnmask.attention.visibility import key_ranges

# A program's tile of A and its steps over a head's width, for every width; a warp has
# 16 rows. With 168 registers per thread, three programs share a multiprocessor, and
# ptxas spills no registers: see tests/attention/test_fused_compile.py.
TILES = {"ROWS": 64, "COLUMNS": 32, "CHUNK": 16}
LAUNCH = {"num_warps": 4, "num_stages": 3, "maxnreg": 168}


def error_and_gradient(
    reference: AttentionCall,
    query: Tensor,
    key: Tensor,
    matrix_weight: float,
    output_weight: float,
    output_projection: Tensor | None,
    need_gradient: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Compute ``attention_error`` and its gradients; see there for the arguments.

    :return: scalar and, if needed, [B, H, L, dh] and [B, G, L, dh], all float32
    """
    problem = _Problem(reference, query, key, matrix_weight, bool(output_weight))
    context = problem.statistics()
    squares, reached, inner = problem.change()
    error = matrix_weight * squares
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


def _padded(mask: Tensor, keys: int) -> Tensor:
    """Pad the mask to contiguous rows of whole tiles, so that kernels check no end."""
    mask = mask.expand(*mask.shape[:-1], keys)
    rest = -keys % TILES["COLUMNS"]
    whole = rest == 0 and mask.stride(-1) == 1
    return mask if whole else pad(mask, (0, rest)).contiguous()


class _Problem:
    """The arguments that the kernels share, and their launches in order."""

    def __init__(
        self,
        call: AttentionCall,
        query: Tensor,
        key: Tensor,
        matrix_weight: float,
        with_output: bool,
    ):
        self.batch, self.heads, self.length, width = query.shape
        self.groups, self.keys = key.shape[1:3]
        self.tensors = [
            tensor.detach().contiguous()
            for tensor in (call.query, query, call.key, key, call.value)
        ]
        rows, columns = TILES["ROWS"], TILES["COLUMNS"]
        self.by_row = triton.cdiv(self.length, rows), self.batch * self.heads
        self.by_column = triton.cdiv(self.keys, columns), self.batch * self.groups
        self.ranges = key_ranges(call, rows).to(torch.int32).contiguous()
        self.sinks = call.sinks
        mask, strides = self.ranges, [0, 0, 0]
        if call.mask is not None:
            mask = _padded(call.mask, self.keys)
            shape = (self.batch, self.heads, self.length, mask.shape[-1])
            strides = list(mask.expand(shape).stride()[:3])
        # for each row, m and 1 / l of the dense logits, then of the pruned ones
        self.softmax = self._new(self.length, 4)
        self.common = (
            *self.tensors,
            self.softmax,
            self.ranges,
            mask,
            *strides,
            call.scaling,
            call.softcap or 1.0,
            matrix_weight,
            self.heads,
            self.groups,
            self.length,
            self.keys,
        )
        self.options: dict[str, Any] = {
            "OUTPUT": with_output,
            "dh": width,
            "dv": call.value.shape[-1],
            "MASKED": call.mask is not None,
            "CAPPED": call.softcap is not None,
            **TILES,
            **LAUNCH,
        }

    def _new(self, *shape: int) -> Tensor:
        return self.tensors[0].new_zeros(
            (self.batch, self.heads, *shape), dtype=torch.float32
        )

    def _wide(self) -> Tensor:
        """Return zeros [B, H, L, dv] to add to, or a stand-in that no kernel reads."""
        used = self.options["OUTPUT"]
        return self._new(self.length, self.options["dv"]) if used else self.softmax

    def statistics(self) -> Tensor:
        """Compute m and l of all rows; return A~ V, [B, H, L, dv].

        A~ V is a stand-in where the output does not count.
        """
        context = self._wide()
        sinks = self.ranges if self.sinks is None else self.sinks
        kernels.statistics[(*self.by_row, 2)](
            *self.common, sinks, context, HAS_SINKS=sinks is self.sinks, **self.options
        )
        return (
            context.mul_(self.softmax[..., 3:]) if self.options["OUTPUT"] else context
        )

    def change(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ||A~ - A||_F^2, (A~ - A) V and rowsum(A~ o (A~ - A)).

        (A~ - A) V, [B, H, L, dv], is computed only where the output counts; the sums,
        [B, H, L], always.
        """
        squares, inner, reached = (
            self._new(self.length),
            self._new(self.length),
            self._wide(),
        )
        kernels.change[self.by_row](
            *self.common, squares, inner, reached, **self.options
        )
        return squares.sum(), reached, inner

    def gradients(
        self, upstream: Tensor | None, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return dE/dQ~ and dE/dK~.

        :param upstream: U, [B, H, L, dv], where the output counts
        :param delta: [B, H, L]
        """
        to_query = torch.zeros_like(self.tensors[1], dtype=torch.float32)
        to_key = torch.zeros_like(self.tensors[3], dtype=torch.float32)
        given = delta if upstream is None else upstream, delta
        kernels.query_gradient[self.by_row](
            *self.common, *given, to_query, **self.options
        )
        kernels.key_gradient[self.by_column](
            *self.common, *given, to_key, **self.options
        )
        return to_query, to_key
