"""The CUDA decode kernel on a CPU, with the primitives in ``emulation``."""

import ctypes
from pathlib import Path

import pytest

from llmc_attnmask.serving.kernels import cuda_decode
from tests.support.compiler import shared_library

SOURCES = Path(__file__).parent / "emulation"
KERNEL = Path(cuda_decode.__file__).parent / "cuda"
_LINEAR = cuda_decode.linear  # tests replace it with the emulator's


def flags(kernel: Path = KERNEL) -> list[str]:
    """The compiler's flags, which find the emulation's primitives before the kernel's.

    :param kernel: folder of the kernel's sources
    """
    language = ["-x", "c++", "-std=c++17", "-fno-exceptions", "-fno-rtti"]
    return [*language, "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{kernel}"]


class Emulator:
    """Launches the kernel, thread by thread."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        kernel: Path = KERNEL,
        block: cuda_decode.Block = cuda_decode.BLOCK,
    ):
        """
        :param folder: where the kernel is compiled
        :param options: further options of the compiler
        :param kernel: as in ``flags``
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

    def linear(self, *arguments, multiprocessors: int = 4, seed: int = 0, **how):
        """Run ``cuda_decode.linear`` on CPU tensors, with launches in the emulator.

        :param multiprocessors: more of them split K more often
        :param seed: of the order of threads and blocks
        """

        def launch(plan, dtype, given, _):
            failure = self._library.emulate(
                list(cuda_decode.KINDS).index(dtype),
                plan.tile,
                ctypes.addressof(given),
                (ctypes.c_int * 3)(*plan.grid),
                plan.shared_memory,
                seed,
            )
            assert failure is None, failure.decode()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_decode, "_launch", launch)
            patch.setattr(cuda_decode, "_multiprocessors", lambda _: multiprocessors)
            return _LINEAR(*arguments, block=self.block, **how)
