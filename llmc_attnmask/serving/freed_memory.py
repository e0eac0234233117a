"""Give freed memory back to the system, which the allocator may keep.

glibc keeps freed blocks of up to 32 MB for later. When dense layers of that size make
way for smaller sparse ones, so much is kept that a sparse model takes more memory than
a dense one.
"""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return what has been freed, in milliseconds, if the allocator can do that."""
    for release in _releases():
        release()


@functools.cache
def _releases() -> list[Callable[[], object]]:
    """Return calls of the allocators in this process: glibc's, and tcmalloc."""
    process, found = ctypes.CDLL(None), list[Callable[[], object]]()
    if hasattr(process, "malloc_trim"):
        found.append(functools.partial(process.malloc_trim, 0))
    if hasattr(process, "MallocExtension_ReleaseFreeMemory"):  # if it is preloaded
        found.append(process.MallocExtension_ReleaseFreeMemory)
    return found
