"""``cuda_decode.cu`` on a CPU, by ``emulator.h``."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import cuda_decode
from tests.compiler import shared_library

_HERE = Path(__file__).parent
_KERNELS = Path(cuda_decode.__file__).parent
FLAGS = ("-x", "c++", "-std=c++17", "-fno-exceptions", "-fno-rtti")
FLAGS += ("-Wno-unknown-pragmas", f"-I{_KERNELS}", f"-I{_HERE}")


class Emulator:
    """Launches of the kernel, thread by thread."""

    def __init__(
        self,
        folder: Path,
        source: Path = _HERE / "emulator.cc",
        *flags: str,
        block: cuda_decode.Block = cuda_decode.BLOCK,
    ):
        self.block = block
        flags += (f"-DBLOCK_ROWS={block.rows}", f"-DRING_STAGES={block.stages}")
        self._library = ctypes.CDLL(str(shared_library(source, folder, *FLAGS, *flags)))
        self._library.emulate.restype = ctypes.c_char_p
        self._library.emulate.argtypes = (
            *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_size_t, ctypes.c_int),
        )

    def linear(
        self,
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        arrived: Tensor,
        channel_scale: Tensor | None,
        token_scale: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        span: int = 1,
        *,
        multiprocessors: int = 4,
        seed: int = 0,
    ) -> Tensor:
        """As ``cuda_decode.linear``, with its plan, of CPU tensors.

        :param multiprocessors: more of them split K more often
        :param seed: for the order of threads and blocks
        """
        rows = values.shape[0]
        how = cuda_decode.plan(
            *(len(x), rows, x.shape[1], x.dtype, multiprocessors, self.block)
        )
        out = torch.full((len(x), rows), float("nan"), dtype=out_dtype)
        shape = (how.split, len(x), rows)
        partial = torch.full(shape, -1, dtype=torch.int32) if how.split > 1 else None
        given = cuda_decode.arguments(
            *(how, x, values, metadata, arrived),
            *(channel_scale, token_scale, bias, out, partial, span),
        )
        failure = self._library.emulate(
            list(cuda_decode.KINDS).index(x.dtype),
            how.tile,
            ctypes.addressof(given),
            (ctypes.c_int * 3)(*how.grid),
            how.shared_memory,
            seed,
        )
        assert failure is None, failure.decode()
        return out
