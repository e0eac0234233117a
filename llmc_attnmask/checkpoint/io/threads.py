"""Work on several tensors at once: the slow parts release the interpreter lock."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_WORKERS = min(4, os.cpu_count() or 1)  # more would only wait for the disk

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Yield results in the order of the items; after an error, no new item starts."""
    threads = torch.get_num_threads()
    # one thread per worker: by default, each worker would use one per core
    pool = ThreadPoolExecutor(
        _WORKERS, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads started later take this number, too
