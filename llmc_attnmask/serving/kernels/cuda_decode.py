"""A 2:4 linear layer for few tokens, in CUDA C++ on the sparse tensor cores.

The kernel and its description are in ``cuda/decode.cu``. NVRTC compiles it for the GPU
in use, once per dtype and process, when the first layer is checked at load.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import fragments, nvrtc, packing

KINDS = {
    torch.bfloat16: "BF16",
    torch.float16: "FP16",
    torch.int8: "INT8",
    torch.float8_e4m3fn: "FP8",
}
MULTIPLE = {2: 16, 1: 32}  # of columns, by bytes per entry: copies take 16 bytes
TILES = (1, 2, 4, 8)  # tokens of one block, in eights
LINE = 128  # as in cuda/stage.cuh
MAX_SPLIT = 16
FEWEST_STAGES = 4  # of K for one block: a ring that never fills hides no latency
_SOURCES = Path(__file__).parent / "cuda"
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_TYPE = 3
_SHARED = 228 * 1024  # bytes of a Hopper multiprocessor; each block takes 1 KB extra
_MULTIPROCESSORS = 132  # those of an H100, where there is no GPU to ask


class Arguments(ctypes.Structure):
    """The kernel's ``struct Arguments``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "values", "metadata", "channel_scale", "token_scale"),
                *("bias", "out", "partial", "arrived"),
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                *("tokens", "rows", "columns", "stages_each"),
                *("row_tiles", "span", "bias_type", "out_type"),
            )
        ),
    )


@dataclass(frozen=True)
class Block:
    """The block size that the kernel is compiled for."""

    rows: int = 64  # of the weight, 64 or 128
    stages: int = 4  # of the ring

    @property
    def threads(self) -> int:
        return 2 * self.rows

    @property
    def tiles(self) -> tuple[int, ...]:
        """Those of ``TILES`` with enough tokens for the block's threads."""
        return TILES if self.rows == 64 else TILES[1:]

    def shared_memory(self, tile: int, dtype: torch.dtype) -> int:
        """Return the bytes of the ring, which later also holds the sums."""
        columns = fragments.STAGE[dtype.itemsize]
        expanded = dtype == torch.float8_e4m3fn
        token = columns * (2 if expanded else dtype.itemsize)
        ring = self.stages * self.rows * (LINE + columns // 8)
        ring += (2 if expanded else self.stages) * 8 * tile * token
        return max(ring, 8 * tile * (self.rows + 4) * 4)

    def at_once(self, tile: int, dtype: torch.dtype) -> int:
        """Return how many blocks a Hopper multiprocessor runs at once.

        Registers limit them (as in the source's ``max_blocks``), and shared memory.
        """
        by_registers = max(1, {1: 4, 2: 4, 4: 3, 8: 2}[tile] * 64 // self.rows)
        return min(by_registers, _SHARED // (self.shared_memory(tile, dtype) + 1024))


BLOCK = Block()  # unmeasured: see integration/gpu/RESULTS.md


@dataclass(frozen=True)
class Plan:
    """How one product is divided among blocks."""

    block: Block
    tile: int  # tokens of a block, in eights
    split: int  # blocks that share a sum over K
    stages: int  # of K, for one of these blocks
    grid: tuple[int, int, int]
    shared_memory: int  # bytes


def unfit(columns: int, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot multiply a weight of K columns; None if it can."""
    if dtype not in KINDS:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if columns % MULTIPLE[dtype.itemsize]:
        return f"{columns} inputs, not a multiple of {MULTIPLE[dtype.itemsize]}"
    return None


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 weight.

    :param weight: [rows, K] in fp16, bf16, int8 or fp8 e4m3, on any device
    :return: kept values [rows, K/2]; metadata, uint8, from ``fragments.metadata``
    :raises ValueError: if it is not 2:4, or K is not a multiple of 16 (8 bits: of 32)
    """
    if reason := unfit(weight.shape[1], weight.dtype):
        raise ValueError(f"the decode kernel does not support this weight: {reason}")
    values, nibbles = packing.kept(weight)
    return values, fragments.metadata(nibbles, weight.itemsize)


def counters(rows: int, device: torch.device) -> Tensor:
    """Return counters of finished blocks; they are zero between products.

    :return: int32 [blocks of 64 rows]; each weight needs its own, because two products
        that run at the same time must not share it
    """
    return torch.zeros(-(-rows // 64), dtype=torch.int32, device=device)


@cache
def plan(
    tokens: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    multiprocessors: int = _MULTIPROCESSORS,
    block: Block = BLOCK,
) -> Plan:
    """Divide a product among as many blocks as run at once, or one for every tile.

    The division is unmeasured: see integration/gpu/RESULTS.md.
    """
    tile = next((n for n in block.tiles if 8 * n >= tokens), TILES[-1])
    stages = -(-columns // fragments.STAGE[dtype.itemsize])
    row_blocks, token_blocks = -(-rows // block.rows), -(-tokens // (8 * tile))
    room = multiprocessors * block.at_once(tile, dtype)
    split = max(1, min(MAX_SPLIT, room // row_blocks, stages // FEWEST_STAGES))
    if token_blocks > 1:  # counters exist for row blocks only
        split = 1
    each = -(-stages // split)
    grid = (row_blocks, -(-stages // each), token_blocks)
    return Plan(block, tile, grid[1], each, grid, block.shared_memory(tile, dtype))


def kernel_name(dtype: torch.dtype, tile: int) -> str:
    """Name expression of a template instance."""
    return f"sparse_linear<{KINDS[dtype]}, {tile}>"


def compile_kernels(
    dtype: torch.dtype, architecture: str, block: Block = BLOCK
) -> tuple[bytes, dict]:
    """Compile all tiles of one dtype; this needs NVRTC, but no GPU.

    :param architecture: ``sm_80`` or newer; for fp8 ``sm_89`` or newer
    :return: as ``nvrtc.compile_cubin`` does
    """
    return nvrtc.compile_cubin(
        (_SOURCES / "decode.cu").read_text("utf-8"),
        "decode.cu",
        {path.name: path.read_text("utf-8") for path in _SOURCES.glob("*.cuh")},
        [kernel_name(dtype, tile) for tile in block.tiles],
        architecture,
        {"BLOCK_ROWS": block.rows, "RING_STAGES": block.stages},
    )


@cache
def _module(dtype: torch.dtype, device: int, block: Block) -> nvrtc.Module:
    # for the current device, whose context torch has made current
    architecture = nvrtc.architecture(device)
    module = nvrtc.Module(*compile_kernels(dtype, architecture, block))
    for tile in block.tiles:
        size = block.shared_memory(tile, dtype)
        module.allow_shared_memory(kernel_name(dtype, tile), size)
    return module


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    arrived: Tensor,
    channel_scale: Tensor | None,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    span: int = 1,
    block: Block = BLOCK,
) -> Tensor:
    """Multiply: ``x W^T`` for a packed W of x's dtype.

    :param x: [tokens, K], contiguous
    :param values: [rows, K/2], contiguous, from ``pack``
    :param metadata: from ``pack``, or stored in other spans
    :param arrived: from ``counters``
    :param channel_scale: fp32 [rows], of an 8-bit weight
    :param token_scale: fp32 [tokens], of an 8-bit x
    :param bias: [rows] in 16 or 32 bits
    :param out_dtype: fp16, bf16 or fp32
    :param span: of the metadata, see ``fragments``
    :return: [tokens, rows]
    """
    tokens, columns = x.shape
    rows = len(values)
    multiprocessors = _multiprocessors(x.device)
    how = plan(tokens, rows, columns, x.dtype, multiprocessors, block)
    out = x.new_empty(tokens, rows, dtype=out_dtype)
    partial = None
    if how.split > 1:
        partial = x.new_empty(how.split, tokens, rows, dtype=torch.int32)
    if x.data_ptr() % 16:
        x = x.clone()
    tensors = (x, values, metadata, channel_scale, token_scale, bias, out, partial)
    pointers = (None if t is None else t.data_ptr() for t in (*tensors, arrived))
    row_tiles = -(-rows // fragments.ROWS) * fragments.ROWS // fragments.TILE
    given = Arguments(
        *pointers,
        *(tokens, rows, columns, how.stages, row_tiles, span),
        _NO_TYPE if bias is None else _TYPES[bias.dtype],
        _TYPES[out_dtype],
    )
    _launch(how, x.dtype, given, x.device)
    return out


def _launch(
    how: Plan, dtype: torch.dtype, given: Arguments, device: torch.device
) -> None:
    with torch.cuda.device(device):
        _module(dtype, device.index, how.block).launch(
            kernel_name(dtype, how.tile),
            how.grid,
            how.block.threads,
            how.shared_memory,
            torch.cuda.current_stream().cuda_stream,
            given,
        )
