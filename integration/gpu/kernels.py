"""All kernels behind one interface, for checking and timing.

``KERNELS`` has the sparse kernels and the dense ones that they must beat. A kernel
packs a weight once and then multiplies tokens with it; where it cannot run, it says
why.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from integration.gpu.context import short
from integration.gpu.weights import Weight
from llmc_attnmask.serving.kernels import (
    cuda_decode,
    cusparselt,
    nvrtc,
    op,
    packing,
    select,
)
from llmc_attnmask.serving.kernels.cusparselt.engine import Engine
from llmc_attnmask.serving.kernels.cusparselt.library import Library

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """How one kernel takes a weight [rows, K]."""

    missing: Callable[[torch.dtype, int, int, str], str | None]  # why it cannot run
    pack: Callable[[Weight], Parts]
    linear: Callable[[Parts, Weight, Tensor, Tensor | None], Tensor]
    prepare: Callable[[Parts, Weight, list[int]], None] = lambda *_: None


@dataclass(frozen=True)
class Packed:
    """A weight in the form of one kernel."""

    kernel: Kernel
    weight: Weight
    parts: Parts

    def __call__(self, x: Tensor, token_scale: Tensor | None) -> Tensor:
        """Return ``x W^T``.

        :param x: [tokens, K] in the weight's dtype
        :param token_scale: fp32 [tokens], for 8 bits
        :return: [tokens, rows] in ``weight.out_dtype``
        """
        return self.kernel.linear(self.parts, self.weight, x, token_scale)

    @property
    def nbytes(self) -> int:
        """Bytes in GPU memory, without scales."""
        return sum(part.nbytes for part in self.parts)

    def copy(self) -> "Packed":
        """Return the same weight at another address."""
        return replace(self, parts=tuple(part.clone() for part in self.parts))

    def prepare(self, tokens: list[int]) -> None:
        """Prepare for these numbers of tokens, as a server does once at load."""
        self.kernel.prepare(self.parts, self.weight, tokens)


def pack(name: str, weight: Weight) -> Packed:
    """Pack a weight in the form that kernel ``name`` reads."""
    kernel = KERNELS[name]
    return Packed(kernel, weight, kernel.pack(weight))


def missing(name: str, dtype: torch.dtype, shape: tuple[int, int], device: str) -> str:
    """Return why a kernel cannot run on such a weight here; empty if it can."""
    return KERNELS[name].missing(dtype, *shape, device) or ""


def _dense_missing(dtype: torch.dtype, _: int, __: int, device: str) -> str | None:
    if dtype == torch.int8:
        return "torch has no product of int8 with scales; compare with fp8"
    return _no_fp8(dtype, device)


def _no_fp8(dtype: torch.dtype, device: str) -> str | None:
    if device != "cuda" or dtype != torch.float8_e4m3fn:
        return None
    if torch.cuda.get_device_capability() < (8, 9):
        return "fp8 needs capability 8.9"
    return None


def _dense(parts: Parts, weight: Weight, x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None or weight.scale is None:
        return torch.nn.functional.linear(x, parts[0])
    return torch._scaled_mm(
        x,
        parts[0].t(),
        scale_a=scale[:, None],
        scale_b=weight.scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _vllm_missing(dtype: torch.dtype, _: int, __: int, device: str) -> str | None:
    if dtype.itemsize != 1:
        return "supports only 8 bits"
    if device != "cuda":
        return "needs a GPU"
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    try:
        from vllm import _custom_ops  # noqa: F401
        from vllm.platforms import current_platform  # noqa: F401

        torch.ops._C.cutlass_scaled_mm  # noqa: B018
    except Exception as error:  # whatever a reduced vLLM lacks
        return short(error)
    return _no_fp8(dtype, device)


def _vllm(parts: Parts, weight: Weight, x: Tensor, scale: Tensor | None) -> Tensor:
    assert weight.scale is not None and scale is not None
    ops = importlib.import_module("vllm._custom_ops")
    out: Tensor = ops.cutlass_scaled_mm(
        x, parts[0].t(), scale[:, None], weight.scale[:, None], torch.bfloat16
    )
    return out


def _triton_missing(
    dtype: torch.dtype, _: int, columns: int, device: str
) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if columns % packing.COLUMNS:
        return f"{columns} columns are not a multiple of {packing.COLUMNS}"
    if device != "cuda" and not select.interpreted():
        return "needs a GPU, or TRITON_INTERPRET=1"
    return _no_fp8(dtype, device)


def _triton(parts: Parts, weight: Weight, x: Tensor, scale: Tensor | None) -> Tensor:
    from llmc_attnmask.serving.kernels import triton_decode

    values, indices = parts
    return triton_decode.linear(
        x, values, indices, weight.scale, scale, None, weight.out_dtype
    )


def _cusparselt_missing(
    dtype: torch.dtype, rows: int, columns: int, device: str
) -> str | None:
    if why := cusparselt.why_not():
        return why
    if not cusparselt.fits(rows, columns, dtype.itemsize):
        return f"cuSPARSELt does not support {rows} x {columns}"
    return _no_fp8(dtype, device)


def _cusparselt(
    parts: Parts, weight: Weight, x: Tensor, scale: Tensor | None
) -> Tensor:
    # through the operator, as when serving: its own time counts in an eager call
    return op.sparse_linear(
        *(x, None, None, None, parts[0], 1),
        *(weight.scale, scale, None, 0, weight.out_dtype),
    )


def searched(packed: Packed) -> list[int] | None:
    """Return the numbers of tokens for which cuSPARSELt's algorithm was searched.

    Once the time for searches is spent, cuSPARSELt uses its default. None for other
    kernels.
    """
    if packed.kernel is not KERNELS["cusparselt"]:
        return None
    return cusparselt.engine().searched(packed.parts[0], packed.weight.dense.shape[1])


def _search(parts: Parts, weight: Weight, tokens: list[int]) -> None:
    cusparselt.prepare(parts[0], weight.dense.shape[1], largest=max(tokens))


@lru_cache(maxsize=1)
def _unsearched() -> Engine:
    # with plans of its own, not those of `cusparselt`
    return Engine(Library.of_torch())


def _take_the_default(parts: Parts, weight: Weight, tokens: list[int]) -> None:
    columns = weight.dense.shape[1]
    _unsearched().prepare(parts[0], columns, largest=max(tokens), search=False)


def _cusparselt_unsearched(
    parts: Parts, weight: Weight, x: Tensor, scale: Tensor | None
) -> Tensor:
    return _unsearched().linear(
        x, parts[0], weight.scale, scale, None, weight.out_dtype
    )


def _cuda_missing(
    dtype: torch.dtype, rows: int, columns: int, device: str
) -> str | None:
    if device != "cuda":
        return "needs a GPU"
    return (
        nvrtc.missing() or cuda_decode.unfit(columns, dtype) or _no_fp8(dtype, device)
    )


def _cuda_pack(weight: Weight) -> Parts:
    dense = weight.dense
    return *cuda_decode.pack(dense), cuda_decode.counters(len(dense), dense.device)


def _cuda(
    parts: Parts,
    weight: Weight,
    x: Tensor,
    scale: Tensor | None,
    block: cuda_decode.Block = cuda_decode.BLOCK,
) -> Tensor:
    values, metadata, counters = parts
    return cuda_decode.linear(
        x,
        values,
        metadata,
        counters,
        weight.scale,
        scale,
        None,
        weight.out_dtype,
        block=block,
    )


SPARSE = ("cuda", "cusparselt", "triton")
BLOCKS = {  # candidates for the decode kernel's block size
    f"cuda {block.rows} x {block.stages}": block
    for block in (
        *(cuda_decode.Block(64, stages) for stages in (3, 5, 6)),
        *(cuda_decode.Block(128, stages) for stages in (3, 4)),
    )
}
KERNELS = {
    "dense": Kernel(_dense_missing, lambda weight: (weight.dense,), _dense),
    "dense vllm": Kernel(_vllm_missing, lambda weight: (weight.dense,), _vllm),
    "cuda": Kernel(_cuda_missing, _cuda_pack, _cuda),
    "cusparselt": Kernel(
        _cusparselt_missing,
        lambda weight: (cusparselt.compress(weight.dense),),
        _cusparselt,
        _search,
    ),
    "cusparselt unsearched": Kernel(
        _cusparselt_missing,
        lambda weight: (cusparselt.compress(weight.dense),),
        _cusparselt_unsearched,
        _take_the_default,
    ),
    "triton": Kernel(
        _triton_missing, lambda weight: packing.pack(weight.dense), _triton
    ),
    **{
        name: Kernel(_cuda_missing, _cuda_pack, partial(_cuda, block=block))
        for name, block in BLOCKS.items()
    },
}
