"""Samples are evaluated on fewer at once where memory is short."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from loguru import logger

from llmc_attnmask.calibration.micro_batches import MAX_MICRO_BATCH, MicroBatch

Result = TypeVar("Result")


class MicroBatchRunner:
    """Runs something on micro-batches, on fewer samples at once if memory is short."""

    def __init__(self) -> None:
        self.at_most = MAX_MICRO_BATCH  # samples at once

    def __call__(
        self, micro_batches: Iterable[MicroBatch], run: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Results of this rank's micro-batches, one by one, with their samples.

        :param run: has no effect but its result, so that it can be repeated
        :raises MemoryError: if one sample alone is too large for the device
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
        # the error, gone by now, has held what the attempt had allocated
        self.at_most = len(samples) // 2
        logger.warning(
            f"out of memory with {len(samples)} calibration samples at once; going on "
            f"with {self.at_most} ({reason})"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
