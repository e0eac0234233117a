"""A layer on a CPU: parts of its rows, each on the kernel that is fastest for it.

A fused layer may mix 2:4, unstructured and dense parts; each gets its own kernel call.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearMethodBase

from llmc_attnmask.serving.dense_twin import DenseTwin, input_quantization
from llmc_attnmask.serving.kernels.cpu import weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear

Structure = Literal["2:4", "unstructured", "dense"]


class Rows(NamedTuple):
    """Consecutive rows of a layer with the same structure."""

    first: int
    last: int  # exclusive
    structure: Structure


class Packed(NamedTuple):
    """Rows in the form that will serve them."""

    rows: Rows
    sparse: weights.Weight | None
    sums: Tensor | None  # int32 [rows], of an int8 weight
    dense: Tensor | None  # [rows, K], if dense is faster
    ratio: float | None  # how many times as fast as dense sparse is, if timed


def merged(widths: Sequence[int], structures: Sequence[Structure]) -> list[Rows]:
    """Join neighboring parts of the same structure.

    :param widths: rows of every part on this rank
    :param structures: of every part; a single one holds for all
    """
    if len(structures) != len(widths):
        if len(set(structures)) > 1:  # parts that are not known: any mask fits all
            structures = ["unstructured"]
        structures = [structures[0]] * len(widths)
    found: list[Rows] = []
    start = 0
    for width, structure in zip(widths, structures, strict=True):
        end = start + width
        if found and found[-1].structure == structure:
            found[-1] = found[-1]._replace(last=end)
        else:
            found.append(Rows(start, end, structure))
        start = end
    return found


class CpuLayer:
    """Multiplies by all parts of a layer and joins the results."""

    def __init__(
        self,
        layer: Any,
        stock: LinearMethodBase,
        packed: Sequence[Packed],
        scale: Tensor | None,
    ) -> None:
        """
        :param layer: with its scales loaded, and not processed yet
        :param scale: float32 [rows], of an int8 weight
        """
        self.is_int8 = scale is not None
        self.static: tuple[Tensor | None, Tensor | None] = (None, None)
        self.symmetric = True
        if scale is not None:
            self.static = input_quantization(layer, stock)
            self.symmetric = layer.scheme.input_symmetric
        self.parts = [
            _Sparse(part, scale)
            if part.sparse is not None
            else _Dense(layer, stock, part, scale)
            for part in packed
        ]

    def multiply(self, _layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """
        :param x: bf16 [tokens, K]
        :return: bf16 [tokens, rows]
        """
        scales, zeros, quantized = None, None, x
        if self.is_int8:
            # the call that vLLM's own INT8 layers make on CPUs
            quantized, scales, zeros = ops.onednn_scaled_int8_quant(
                x.contiguous(), *self.static, self.symmetric
            )
            scales = scales.view(-1).expand(len(x)).contiguous()
            if zeros is not None:
                zeros = zeros.view(-1).expand(len(x)).contiguous()
        outs = []
        for part in self.parts:
            own = None if bias is None else bias[part.first : part.last]
            outs.append(part(x, quantized, scales, zeros, own))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def __str__(self) -> str:
        return ", ".join(
            f"{type(part).__name__} {part.first}:{part.last}" for part in self.parts
        )


class _Sparse:
    def __init__(self, part: Packed, scale: Tensor | None) -> None:
        assert part.sparse is not None
        self.first, self.last = part.rows.first, part.rows.last
        self.columns = part.sparse.columns
        self.tiles = part.sparse.tiles
        self.masks = part.sparse.masks
        self.values = part.sparse.values
        self.starts = part.sparse.starts
        self.sums = part.sums
        self.scale = None if scale is None else scale[self.first : self.last].clone()

    def __call__(
        self,
        x: Tensor,
        quantized: Tensor,
        scales: Tensor | None,
        zeros: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        return cpu_sparse_linear(
            quantized,
            self.last - self.first,
            self.columns,
            *(self.tiles, self.masks, self.values, self.starts),
            *(self.scale, self.sums, scales, zeros, bias),
        )


class _Dense:
    def __init__(
        self, layer: Any, stock: LinearMethodBase, part: Packed, scale: Tensor | None
    ) -> None:
        assert part.dense is not None
        self.first, self.last = part.rows.first, part.rows.last
        own = None if scale is None else scale[self.first : self.last].clone()
        self.twin = DenseTwin(layer, stock, part.dense, own)

    def __call__(
        self,
        x: Tensor,
        quantized: Tensor,
        scales: Tensor | None,
        zeros: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        return self.twin(x, bias)
