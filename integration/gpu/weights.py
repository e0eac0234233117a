"""Random 2:4 weights of Llama-3.1-8B's linear layers, and tokens for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmc_attnmask.checkpoint.layouts.bits import bits_of
from llmc_attnmask.serving.kernels import activations

SHAPES = {  # rows, columns, as vLLM fuses the layers
    "gate_up_proj": (28672, 4096),
    "down_proj": (4096, 14336),
    "qkv_proj": (6144, 4096),
    "o_proj": (4096, 4096),
}
SMALL = {name: (64, 256) for name in SHAPES}  # for a trial on a CPU
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
ROTATED = 2**28  # bytes of dense weights in one round, several times any L2 cache
CALLS = 24  # at least, in one round: they share the cost of starting a replay
CALLS_PREFILL = 4

_PAIRS = torch.tensor(  # which two of four are kept
    [
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ],
    dtype=torch.bool,
)


@dataclass(frozen=True)
class Weight:
    """A 2:4 weight and, for 8 bits, the scales of its rows.

    ``dense`` [rows, K]; ``scale`` fp32 [rows], or None for 16 bits.
    """

    dense: Tensor
    scale: Tensor | None

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the product."""
        return self.dense.dtype if self.dense.itemsize == 2 else torch.bfloat16

    def product(self, x: Tensor, token_scale: Tensor | None) -> Tensor:
        """Return ``x W^T`` in float64, not rounded."""
        out = x.double() @ self.dense.double().t()
        if self.scale is not None and token_scale is not None:
            out *= self.scale.double()
            out *= token_scale.double()[:, None]
        return out


def random_values(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), dtype=dtype, device=device)
    return torch.randn(rows, columns, device=device).to(dtype)


def random_weight(rows: int, columns: int, dtype: torch.dtype, device: str) -> Weight:
    """Return a weight with two of four kept at random indices."""
    dense = random_values(rows, columns, dtype, device)
    choice = torch.randint(len(_PAIRS), (rows, columns // 4), device=device)
    pruned = ~_PAIRS.to(device)[choice].view(rows, columns)
    bits_of(dense).masked_fill_(pruned, 0)
    scale = None
    if dtype.itemsize == 1:
        scale = torch.rand(rows, device=device) * 0.01 + 0.001
    return Weight(dense, scale)


def random_tokens(
    count: int, columns: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor | None]:
    """Return [count, columns] in ``dtype`` and, for 8 bits, the tokens' scales."""
    x = torch.randn(count, columns, device=device, dtype=torch.bfloat16)
    if dtype.itemsize == 2:
        return x.to(dtype), None
    return activations.reference(x, dtype)


def copies(rows: int, columns: int, itemsize: int) -> int:
    """Return how many weights must rotate so that no cache holds them."""
    return max(2, -(-ROTATED // (rows * columns * itemsize)))
