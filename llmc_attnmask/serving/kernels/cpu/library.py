"""Load the compiled kernels and call them with tensors.

The library is compiled when the package is built, with a C interface; see
``hatch_build.py``. It uses the OpenMP threads that torch has loaded.
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from llmc_attnmask.serving.kernels.cpu.sources import fingerprint

PATH = Path(__file__).with_name("libattnmask_cpu.so")
_OUT_OF_MEMORY = 1
_STALE = "it was compiled from other sources; install the package again"
_NAMES = {torch.bfloat16: "bf16", torch.int8: "int8"}


def missing() -> str | None:
    """Return why the library cannot be used; None if it can."""
    try:
        load()
    except OSError as error:
        if not PATH.exists():
            return "built without CPU kernels"
        return f"its library cannot be loaded: {error}"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library.

    :raises OSError: if there is none, or if it does not fit this system
    """
    loaded = ctypes.CDLL(str(PATH))
    if not hasattr(loaded, "attnmask_sources"):
        raise OSError(_STALE)
    loaded.attnmask_sources.restype = ctypes.c_char_p
    if loaded.attnmask_sources().decode() != fingerprint(PATH.parent):
        raise OSError(_STALE)
    int8 = [c_void_p] * 4  # scales, row sums, token scales, zero points
    for kernel, forms in (("two_of_four", 1), ("any_mask", 3)):
        for name, scales in (("bf16", []), ("int8", int8)):
            function = getattr(loaded, f"{kernel}_{name}")
            function.restype = c_int
            function.argtypes = [
                *([c_void_p] * forms),
                *(c_int64, c_int64, c_void_p, c_int64),
                *scales,
                *(c_void_p, c_void_p),
            ]
            pack = getattr(loaded, f"{kernel}_{name}_pack")
            pack.restype = c_int
            pack.argtypes = [c_void_p, c_int64, c_int64, *([c_void_p] * forms)]
    for name in _NAMES.values():
        count = getattr(loaded, f"any_mask_{name}_count")
        count.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
    return loaded


def function(kernel: str, dtype: torch.dtype, step: str = "") -> Callable[..., int]:
    """Return a kernel's function for a weight of this dtype.

    :param kernel: "two_of_four" or "any_mask"
    :param step: "" multiplies; "_count" and "_pack" make the form
    """
    # an attribute, not an item, which would be another object without argument types
    found: Callable[..., int] = getattr(load(), f"{kernel}_{_NAMES[dtype]}{step}")
    return found


def threads() -> int:
    """Return the number of threads that kernels run on."""
    found: int = load().attnmask_threads()
    return found


def pointer(tensor: Tensor | None) -> int | None:
    """Return where a tensor's entries lie; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def check(status: int) -> None:
    """Raise the error that a kernel has returned.

    :raises MemoryError: if there is no memory for its activations
    """
    if status == _OUT_OF_MEMORY:
        raise MemoryError("a sparse CPU kernel has no memory for its activations")
