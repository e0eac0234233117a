"""Evaluate micro-batches within the memory there is, and reuse what was freed."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch
from loguru import logger

from llmc_attnmask.calibration.micro_batches import MAX_MICRO_BATCH, MicroBatch

Result = TypeVar("Result")

# parameters of glibc's mallopt, from its malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_REUSED_UP_TO = 2**30  # bytes of one tensor
_KEPT = 2**31 - 1  # bytes of freed memory at the end of the heap


@cache
def reuse_freed_memory() -> None:
    """Let the C library reuse the memory of freed tensors, of up to 1 GiB each.

    By default glibc returns every block over 32 MiB to the system at once. The next
    tensor of that size then costs a page fault per 4 KiB, which takes longer than most
    operations on it. In return, the process may keep up to 2 GiB more than it uses.
    Other C libraries are left as they are, and so are a user's own settings.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # glibc before 2.35 refuses so large a threshold; the other one alone would harm
    if mallopt is not None and mallopt(_MMAP_THRESHOLD, _REUSED_UP_TO):
        mallopt(_TRIM_THRESHOLD, _KEPT)


class MicroBatchRunner:
    """Runs a function on micro-batches, on fewer samples at once if memory runs out."""

    def __init__(self) -> None:
        self.at_most = MAX_MICRO_BATCH  # samples at once

    def __call__(
        self, micro_batches: Iterable[MicroBatch], run: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Yield the samples and the result of each of this rank's micro-batches.

        A micro-batch that is too large is split, and yields one result per part.

        :param run: must have no effect other than its result, as it may be repeated
        :raises MemoryError: if a single sample is too large for the device
        """
        for micro_batch in micro_batches:
            waiting = [list(micro_batch.samples)] if micro_batch.samples else []
            while waiting:
                samples = waiting.pop(0)
                if len(samples) <= self.at_most and (done := self._try(samples, run)):
                    yield samples, done[0]
                    continue
                half = len(samples) // 2
                waiting[:0] = [samples[:half], samples[half:]]

    def _try(
        self, samples: list[int], run: Callable[[list[int]], Result]
    ) -> tuple[Result] | None:
        try:
            return (run(samples),)
        except torch.OutOfMemoryError as error:
            if len(samples) == 1:
                raise MemoryError(
                    f"out of memory with one calibration sample at a time ({error}); "
                    "calibrate on shorter samples (--max-length)"
                ) from error
            reason = str(error).splitlines()[0]
        # only now: the error held on to what the attempt had allocated
        self.at_most = len(samples) // 2
        logger.warning(
            f"out of memory with {len(samples)} calibration samples at once; "
            f"continuing with {self.at_most} ({reason})"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
