"""One log entry per model: which kernel each kind of layer got, and why."""

import logging
from collections import Counter
from dataclasses import dataclass

logger = logging.getLogger("vllm.llmc_attnmask")  # vLLM's handlers and level


@dataclass(frozen=True, order=True)
class Row:
    """What the layers of one kind have in common."""

    kind: str  # "qkv_proj"
    shape: str
    storage: str
    kernel: str
    reason: str


class KernelTable:
    """Collects one row per layer, and logs all of them when the last one arrives."""

    def __init__(self) -> None:
        self._expected: set[str] = set()
        self._rows: dict[str, Row] = {}

    def expect(self, layer: str) -> None:
        self._expected.add(layer)

    def add(self, layer: str, row: Row) -> None:
        self._rows[layer] = row
        if self._rows.keys() >= self._expected:
            logger.info(
                "llmc-attnmask: kernels of the sparse layers\n%s", self.render()
            )
            self._rows.clear()  # a reload fills it again

    def render(self) -> str:
        header = ("layers", "kind", "rows x inputs", "storage", "kernel", "reason")
        counted = sorted(Counter(self._rows.values()).items())
        lines = [header] + [
            (str(n), row.kind, row.shape, row.storage, row.kernel, row.reason)
            for row, n in counted
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in lines
        )
