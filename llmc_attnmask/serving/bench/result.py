"""What ``llmc-attnmask bench`` has found."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Time:
    """Milliseconds for a number of tokens in one step."""

    tokens: int
    dense_ms: float
    sparse_ms: float
    ratio: float = field(init=False)  # how many times as fast as dense sparse is

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.dense_ms / self.sparse_ms)


@dataclass(frozen=True)
class Kind:
    """Layers that are alike; all figures but the first are those of one layer."""

    layers: int
    name: str  # "gate_proj+up_proj"
    rows: int
    columns: int
    zeros: float  # share of entries
    storage: str
    kernel: str
    reason: str  # for the kernel
    dense_bytes: int  # of the weight
    sparse_bytes: int
    times: list[Time]


@dataclass(frozen=True)
class Bench:
    """What sparse kernels gain on one machine."""

    model: str
    machine: str
    vllm: str  # its version
    rival: str  # what of vLLM serves the layers dense
    kinds: list[Kind]
    dense_bytes: int  # of all layers
    sparse_bytes: int
    times: list[Time]  # of all layers
    left_out: int  # Linears of experts, which are served dense either way
