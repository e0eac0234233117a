"""Give freed memory back to the system, which the C library may keep.

glibc keeps freed blocks of up to 32 MB for later. When dense layers of that size make
way for smaller sparse ones, so much is kept that a sparse model takes more memory than
a dense one.
"""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return what has been freed, in milliseconds; do nothing without glibc."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
