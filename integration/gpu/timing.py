"""Time calls: on a GPU with its events, on a CPU with the clock.

Inputs and weights must rotate: a call that finds its weight in a cache measures the
cache. ``calls`` are such rotating calls of one kernel, and all times are per call.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]

REPLAYS = (5, 20)  # at least, at most
BUDGET = 60.0  # milliseconds that the repetitions of one figure may take


def repetitions(milliseconds: float) -> int:
    """Return how often to repeat a measurement that takes this long."""
    least, most = REPLAYS
    return max(least, min(most, round(BUDGET / max(milliseconds, 1e-3))))


class Timer:
    """Measures the median microseconds of one call.

    :param device: "cuda" or "cpu"; on a CPU there are no graphs, so both ways of
        calling are the same
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def graph(self, calls: Sequence[Call]) -> float:
        """Time calls in a recorded and replayed CUDA graph, as a server decodes.

        Every call runs once before, so that nothing is compiled while recording.
        """
        if self.device != "cuda":
            return self.eager(calls)
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()

        def twice() -> None:  # the second launch overlaps with the first replay
            graph.replay()
            graph.replay()

        found = self._median(twice) / (2 * len(calls))
        graph.reset()
        return found

    def eager(self, calls: Sequence[Call]) -> float:
        """Time calls made one by one from Python, including the CPU's work for each."""

        def loop() -> None:
            for call in calls:
                call()

        loop()
        return self._median(loop) / len(calls)

    def _median(self, function: Call) -> float:
        collects = gc.isenabled()
        gc.disable()  # not during a measurement; collecting every time takes seconds
        try:
            count = repetitions(self._once(function) / 1000)
            return statistics.median(self._once(function) for _ in range(count))
        finally:
            if collects:
                gc.enable()

    def _once(self, function: Call) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000
