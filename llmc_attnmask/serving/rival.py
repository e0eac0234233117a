"""Time sparse CPU kernels against vLLM's dense ones, once per shape, at load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearMethodBase

from llmc_attnmask.serving.dense_twin import DenseTwin
from llmc_attnmask.serving.kernels.cpu import weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear
from llmc_attnmask.serving.timing import Timer

ROWS = 4096  # at most; more take the same time per row
REPEATS = 5
TOLERANCE = 0.05  # of a form's size: about the same speed

_known: dict[tuple[object, ...], list["Timed"]] = {}


@dataclass(frozen=True)
class Timed:
    """What one comparison has found."""

    ratio: float  # dense time over sparse time
    bytes_per_entry: float  # of the sparse form

    def settles(self, bytes_per_entry: float) -> bool:
        """Return whether a form of this size would win or lose in the same way."""
        relative = bytes_per_entry / self.bytes_per_entry
        if self.ratio >= 1:
            return relative <= 1 + TOLERANCE
        return relative >= 1 - TOLERANCE


@dataclass
class Rival:
    """Compares parts of one layer, at one token, with what would serve them dense."""

    layer: Any
    stock: LinearMethodBase

    def ratio(self, sparse: weights.Weight, weight: Tensor) -> float:
        """Return how many times as fast as dense the sparse kernel is.

        It is that of another layer of this shape if that settles the question.

        :param sparse: the form of the weight
        :param weight: [rows, K]
        """
        shape = (min(ROWS, len(weight)), *weight.shape[1:])
        key = (*shape, weight.dtype, sparse.tiles is None, type(self.stock))
        size = sparse.nbytes / weight.numel()
        timed = next((t for t in _known.get(key, []) if t.settles(size)), None)
        if timed is None:
            timed = Timed(self._timed(sparse, weight), size)
            _known.setdefault(key, []).append(timed)
        return timed.ratio

    @torch.no_grad()
    def _timed(self, sparse: weights.Weight, weight: Tensor) -> float:
        if len(weight) > ROWS:
            weight = weight[:ROWS]
            make = weights.any_mask if sparse.tiles is None else weights.two_of_four
            sparse = make(weight)
        scale = sums = None
        x = torch.ones(1, weight.shape[1], dtype=torch.bfloat16)
        if weight.dtype == torch.int8:
            scale = torch.ones(len(weight), dtype=torch.float32)
            sums = weight.sum(1, dtype=torch.int32)
        twin = DenseTwin(self.layer, self.stock, weight.clone(), scale)

        def ours() -> Tensor:
            if scale is None:
                return cpu_sparse_linear(x, *sparse)
            rounded, scales, _ = ops.onednn_scaled_int8_quant(x)
            return cpu_sparse_linear(rounded, *sparse, scale, sums, scales)

        calls: list[Callable[[], Tensor]] = [lambda: twin(x), ours]
        dense, sparse_time = Timer("cpu").on_cpu(calls, REPEATS)
        return dense / sparse_time
