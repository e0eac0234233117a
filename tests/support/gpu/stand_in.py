"""The parts of CUDA that the measuring scripts use, on a CPU: graphs, events, device.

It lets every line that only a GPU would reach run without one. A graph records the
operations of torch that it sees and repeats them when it is replayed; operations on the
device "cuda" run on the CPU. Times mean nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "stand-in for a GPU"


class Graph(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.data_ptr() != again.data_ptr():
                out.copy_(again)

    def reset(self) -> None:
        self.calls.clear()


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    """Stands in for ``torch.cuda.graph``."""
    with graph:
        yield


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return (later.at - self.at) * 1000


class OnTheCpu(TorchFunctionMode):
    """Redirects operations on the GPU to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(x, str) and x == "cuda" else x for x in args)
        return func(*args, **kwargs)


@contextmanager
def cuda(monkeypatch) -> Iterator[None]:
    """Make torch appear to have a GPU of capability 9.0."""
    for name, value in {
        "CUDAGraph": Graph,
        "graph": recording,
        "Event": Event,
        "is_available": lambda: True,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 2**20,
        "reset_peak_memory_stats": lambda *_: None,
        "cudart": lambda: SimpleNamespace(
            cudaProfilerStart=lambda: None, cudaProfilerStop=lambda: None
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with OnTheCpu():
        yield
