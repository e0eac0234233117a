"""Time two ways of computing the same, in turn, with weights that come from memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

REPEATS = (3, 50)  # at least, at most
CUDA_CACHE = 128 << 20  # bytes; more than the second-level cache of any GPU


def in_turn(
    calls: Sequence[Call], device: str, cache: int, seconds: float
) -> list[float]:
    """Return the median milliseconds of each call.

    On a GPU, each is recorded in a CUDA graph first, as a server records decoding.

    :param device: "cpu" or "cuda"
    :param cache: bytes of the CPU's last-level cache, which is emptied between calls
    :param seconds: about how long to measure
    """
    once = _OnCuda(calls) if device == "cuda" else _OnCpu(calls, cache)
    start = time.perf_counter()
    for which in range(len(calls)):
        once(which)
    took = time.perf_counter() - start
    least, most = REPEATS
    repeats = max(least, min(most, int(seconds / max(took, 1e-6))))
    times = [[once(which) for which in range(len(calls))] for _ in range(repeats)]
    return [sorted(column)[repeats // 2] for column in zip(*times, strict=True)]


class _OnCpu:
    def __init__(self, calls: Sequence[Call], cache: int) -> None:
        self._calls = calls
        self._other = torch.zeros(2 * cache, dtype=torch.uint8)
        for call in calls:
            call()

    def __call__(self, which: int) -> float:
        self._other.add_(1)
        start = time.perf_counter()
        self._calls[which]()
        return 1e3 * (time.perf_counter() - start)


class _OnCuda:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._other = torch.zeros(CUDA_CACHE, dtype=torch.uint8, device="cuda")
        self._graphs = [self._recorded(call) for call in calls]

    @staticmethod
    def _recorded(call: Call) -> torch.cuda.CUDAGraph:
        call()  # so that nothing is compiled while recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph

    def __call__(self, which: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.add_(1)
        begin.record()
        self._graphs[which].replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
