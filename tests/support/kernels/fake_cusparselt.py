"""Compile, load and control fake_cusparselt.c from Python."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llmc_attnmask.serving.kernels.cusparselt.library import Library
from tests.support.compiler import shared_library
from tests.support.kernels.matrices import random_2of4, random_values

SOURCE = Path(__file__).with_suffix(".c")
ROWS, COLUMNS = 32, 64  # of the weight in most tests


class Fake:
    """One copy of the fake library."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.path = shared_library(SOURCE, folder, *flags)
        self.shared = ctypes.CDLL(str(self.path))
        self.shared.fake_calls.restype = ctypes.c_char_p
        self.shared.fake_last_stream.restype = ctypes.c_void_p
        self.reset()

    def reset(self) -> None:
        """Forget calls, failures, version and capture; objects stay alive."""
        self.shared.fake_reset()

    def library(self) -> Library:
        return Library.load(self.path)

    def calls(self) -> list[str]:
        """The functions called since the last reset, without their common prefix."""
        lines = self.shared.fake_calls().decode().split()
        return [line.removeprefix("cusparseLt") for line in lines]

    def live(self) -> int:
        """How many objects were created and not destroyed."""
        return self.shared.fake_live()

    def forget(self) -> None:
        """Stop counting what a destructor that was made to fail has left behind."""
        self.shared.fake_forget()

    def fail(self, function: str, status: int, nth: int = 1) -> None:
        """Make the nth call of a function from now on return this status."""
        self.shared.fake_fail(f"cusparseLt{function}".encode(), nth, status)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Within, every function fails except the one that only launches."""
        self.shared.fake_capture(True)
        yield
        self.shared.fake_capture(False)

    def set_version(self, *parts: int) -> None:
        self.shared.fake_version(*parts)


def compressed_weight(engine, dtype=torch.bfloat16):
    return engine.compress(random_2of4(ROWS, COLUMNS, dtype))


def multiply(engine, compressed, tokens):
    dtype = compressed.dtype
    x = random_values((tokens, COLUMNS), dtype)
    scales = (None, None)
    if dtype.itemsize == 1:
        scales = (torch.ones(ROWS), torch.ones(tokens))
    return engine.linear(x, compressed, *scales, None, torch.bfloat16)
