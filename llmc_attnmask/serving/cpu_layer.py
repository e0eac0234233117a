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


class Inputs(NamedTuple):
    """What a layer is given, in the forms that its parts may take."""

    x: Tensor  # bf16 [tokens, K]
    quantized: Tensor  # int8 [tokens, K] for an int8 weight, otherwise x
    scales: Tensor | None  # float32 [tokens], of ``quantized``
    zeros: Tensor | None  # int32 [tokens], of ``quantized``; None if symmetric


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
        inputs = Inputs(x, quantized, scales, zeros)
        outs = [part(inputs, _own(bias, part.rows)) for part in self.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights."""
        return sum(part.nbytes for part in self.parts)

    def __str__(self) -> str:
        return ", ".join(
            f"{type(part).__name__} {part.rows.first}:{part.rows.last}"
            for part in self.parts
        )


class _Sparse:
    def __init__(self, part: Packed, scale: Tensor | None) -> None:
        assert part.sparse is not None
        self.rows = part.rows
        self.weight = part.sparse
        self.sums = part.sums
        self.scale = _own(scale, part.rows)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, inputs: Inputs, bias: Tensor | None) -> Tensor:
        _, quantized, scales, zeros = inputs
        return cpu_sparse_linear(
            quantized, *self.weight, self.scale, self.sums, scales, zeros, bias
        )


class _Dense:
    def __init__(
        self, layer: Any, stock: LinearMethodBase, part: Packed, scale: Tensor | None
    ) -> None:
        assert part.dense is not None
        self.rows = part.rows
        self.nbytes = part.dense.nbytes
        self.twin = DenseTwin(layer, stock, part.dense, _own(scale, part.rows))

    def __call__(self, inputs: Inputs, bias: Tensor | None) -> Tensor:
        return self.twin(inputs.x, bias)


def _own(of_rows: Tensor | None, rows: Rows) -> Tensor | None:
    """Return a part's share of what a layer has for every row."""
    return None if of_rows is None else of_rows[rows.first : rows.last]
