"""Time sparse CPU kernels against vLLM's dense ones, once per shape, at load."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearMethodBase

from llmc_attnmask.serving.dense_twin import DenseTwin
from llmc_attnmask.serving.kernels.cpu import weights
from llmc_attnmask.serving.kernels.cpu.op import cpu_sparse_linear

ROWS = 4096  # at most; more take the same time per row
REPEATS = 5
CACHE = 64 << 20  # bytes; read in between, as other layers' weights are while serving


_known: dict[tuple[object, ...], list["Timed"]] = {}


@dataclass(frozen=True)
class Timed:
    """What one comparison has found."""

    ratio: float  # dense time over sparse time
    bytes_per_entry: float  # of the sparse form

    def settles(self, bytes_per_entry: float) -> bool:
        """Return whether a form of this size would win or lose in the same way."""
        if self.ratio >= 1:
            return bytes_per_entry <= self.bytes_per_entry
        return bytes_per_entry >= self.bytes_per_entry


@dataclass
class Rival:
    """Compares parts of one layer, at one token, with what would serve them dense."""

    layer: Any
    stock: LinearMethodBase
    ratios: list[float] = field(default_factory=list)  # of the parts so far

    def wins(self, sparse: weights.Weight, weight: Tensor) -> bool:
        """Return whether dense is faster.

        :param sparse: the form of the weight
        :param weight: [rows, K]
        """
        shape = (min(ROWS, len(weight)), *weight.shape[1:])
        key = (*shape, weight.dtype, sparse.tiles is None, type(self.stock))
        size = sparse.nbytes / weight.numel()
        timed = next((t for t in _known.get(key, []) if t.settles(size)), None)
        if timed is None:
            timed = Timed(self._ratio(sparse, weight), size)
            _known.setdefault(key, []).append(timed)
        self.ratios.append(timed.ratio)
        return timed.ratio < 1

    @torch.no_grad()
    def _ratio(self, sparse: weights.Weight, weight: Tensor) -> float:
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
        times: list[list[float]] = [[], []]
        other = torch.zeros(CACHE, dtype=torch.uint8)
        for _ in range(REPEATS):
            for call, taken in zip(calls, times, strict=True):
                other.add_(1)
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        dense, sparse_time = (sorted(taken)[REPEATS // 2] for taken in times)
        return dense / sparse_time
