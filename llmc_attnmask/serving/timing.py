"""Time several ways of computing the same, with weights that come from memory."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

REPEATS = (3, 50)  # at least, at most
CUDA_CACHE = 256 << 20  # bytes; more than the second-level cache of any GPU
LARGEST_CACHE = 2 << 30  # bytes


class Timer:
    """Measures calls in turn; before each, it empties the cache of the processor.

    Weights then come from memory, as they do while serving.
    """

    def __init__(self, device: str, cache: int | None = None) -> None:
        """
        :param device: "cpu" or "cuda"
        :param cache: bytes of a CPU's last-level cache; by default this machine's
        """
        self.device = device
        if device == "cuda":
            size = CUDA_CACHE
        else:
            size = 2 * (cache_bytes() if cache is None else cache)
        self.other = torch.zeros(size, dtype=torch.uint8, device=device)

    def within(self, calls: Sequence[Call], seconds: float) -> list[float]:
        """Return the median milliseconds of each call, after a first round.

        On a GPU, each is recorded in a CUDA graph first, as a server records decoding.

        :param seconds: about how long to measure
        """
        for call in calls:
            call()  # whatever happens only once
        if self.device == "cuda":
            measures = [self._on_cuda(call) for call in calls]
        else:
            measures = [functools.partial(self._on_cpu, call) for call in calls]
        start = time.perf_counter()
        for measure in measures:
            measure()
        took = time.perf_counter() - start
        least, most = REPEATS
        return _medians(measures, max(least, min(most, int(seconds / max(took, 1e-6)))))

    def on_cpu(self, calls: Sequence[Call], repeats: int) -> list[float]:
        """Return the median milliseconds of each call, the first ones included."""
        measures = [functools.partial(self._on_cpu, call) for call in calls]
        return _medians(measures, repeats)

    def _on_cpu(self, call: Call) -> float:
        self.other.add_(1)
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

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


def _medians(measures: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    times = [[measure() for measure in measures] for _ in range(repeats)]
    return [sorted(column)[repeats // 2] for column in zip(*times, strict=True)]


@functools.cache
def cache_bytes() -> int:
    """Return the size of all last-level caches of this machine; 32 MB if unknown."""
    found: dict[str, int] = {}
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            size = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text()
        except OSError:
            continue
        if size.endswith("K"):
            found[shared] = int(size[:-1]) << 10
    return min(sum(found.values()) or 32 << 20, LARGEST_CACHE)
