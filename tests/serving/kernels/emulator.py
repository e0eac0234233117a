"""The decode kernel in CUDA on a CPU, by the primitives in ``emulation``."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels import cuda_decode
from tests.compiler import shared_library

SOURCES = Path(__file__).parent / "emulation"
KERNEL = Path(cuda_decode.__file__).parent / "cuda"


def flags(kernel: Path = KERNEL) -> list[str]:
    """For the compiler; the emulation's primitives are found before the kernel's.

    :param kernel: folder of the kernel's sources
    """
    language = ["-x", "c++", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
    return [*language, "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{kernel}"]


class Emulator:
    """Launches of the kernel, thread by thread."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        kernel: Path = KERNEL,
        block: cuda_decode.Block = cuda_decode.BLOCK,
    ):
        """
        :param folder: where it is compiled
        :param options: for the compiler
        :param kernel: as of ``flags``
        """
        self.block = block
        macros = (f"-DBLOCK_ROWS={block.rows}", f"-DRING_STAGES={block.stages}")
        source = SOURCES / "launch.cc"
        library = shared_library(source, folder, *flags(kernel), *options, *macros)
        self._library = ctypes.CDLL(str(library))
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
