"""Time several ways of computing the same, with weights that come from memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

REPEATS = (3, 50)  # at least, at most
CUDA_CACHE = 256 << 20  # bytes; more than the second-level cache of any GPU


class Timer:
    """Measures calls in turn; before each, it empties the cache of the processor."""

    def __init__(self, device: str, cache: int) -> None:
        """
        :param device: "cpu" or "cuda"
        :param cache: bytes of a CPU's last-level cache
        """
        self.device = device
        size = CUDA_CACHE if device == "cuda" else 2 * cache
        self.other = torch.zeros(size, dtype=torch.uint8, device=device)

    def in_turn(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Return the median milliseconds of each call.

        On a GPU, each is recorded in a CUDA graph first, as a server records decoding.

        :param seconds: about how long to measure
        """
        for call in calls:
            call()  # whatever happens only once
        if self.device == "cuda":
            once = [self._on_cuda(call) for call in calls]
        else:
            once = [self._on_cpu(call) for call in calls]
        start = time.perf_counter()
        for measure in once:
            measure()
        took = time.perf_counter() - start
        least, most = REPEATS
        repeats = max(least, min(most, int(seconds / max(took, 1e-6))))
        times = [[measure() for measure in once] for _ in range(repeats)]
        return [sorted(column)[repeats // 2] for column in zip(*times, strict=True)]

    def _on_cpu(self, call: Call) -> Callable[[], float]:
        def measure() -> float:
            self.other.add_(1)
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return measure

    def _on_cuda(self, call: Call) -> Callable[[], float]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()

        def measure() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.other.add_(1)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        return measure
