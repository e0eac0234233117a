"""Look up the figures of one GPU. This needs neither torch nor a GPU."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from integration.gpu import record
from integration.gpu.record import Row

SHAPES = ("gate_up_proj", "down_proj", "qkv_proj", "o_proj")
DTYPES = ("bf16", "fp8", "int8")
REFERENCE = {"bf16": "bf16", "fp8": "fp8", "int8": "fp8"}  # torch's int8 has no scales
DENSE = ("dense", "dense vllm")
SPARSE = ("cuda", "cusparselt", "cusparselt unsearched", "triton")
MANY = 65  # a server runs this many tokens or more eagerly, fewer in a CUDA graph
NOT_YET = "not yet"


@dataclass(frozen=True)
class Best:
    """The fastest sparse kernel of a case, compared with dense."""

    kernel: str
    us: float
    dense: float

    @property
    def ratio(self) -> float:
        """Speed relative to dense; above 1, the kernel is faster."""
        return self.dense / self.us


class Figures:
    """What was measured on one GPU; the last of repeated measurements counts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self.times: dict[tuple[str, str, int, str, str], float] = {}
        for row in self.rows:
            if row["step"] in ("decode", "prefill") and "us" in row:
                self.times[
                    row["shape"],
                    row["dtype"],
                    row["tokens"],
                    row["kernel"],
                    row["mode"],
                ] = row["us"]

    def of(self, step: str, **given: Any) -> list[Row]:
        """Return a step's rows that have these entries and did not fail, in order."""
        entries = {"step": step, **given}.items()
        return [
            row for row in self.rows if entries <= row.items() and "failed" not in row
        ]

    def last(self, step: str, key: str, **given: Any) -> Any:
        """Return the last figure of that name; None without one."""
        found = [row[key] for row in self.of(step, **given) if key in row]
        return found[-1] if found else None

    def dense(self, shape: str, dtype: str, tokens: int, mode: str) -> float | None:
        """Return the microseconds of the fastest dense product, torch's or vLLM's.

        It has the same type or the type to compare with.
        """
        found = (
            self.times.get((shape, kind, tokens, kernel, mode))
            for kind in {dtype, REFERENCE[dtype]}
            for kernel in DENSE
        )
        return min((us for us in found if us), default=None)

    def correctness(self) -> list[Row]:
        """Return the last row of every case of the step `correct`.

        A failure of a whole kernel is left out if the kernel succeeded later.
        """
        last: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if row["step"] != "correct" or "kernel" not in row:
                continue
            case = tuple(
                row.get(key) for key in ("kernel", "dtype", "tokens", "rows", "columns")
            )
            last.pop(case, None)
            if row.get("right"):
                last.pop((row["kernel"], None, None, None, None), None)
            last[case] = row
        return list(last.values())

    def setups(self) -> list[dict[str, Any]]:
        """Return the engines' setups (layers and way of running), the deepest first."""
        found = {(row["layers"], row["as_installed"]) for row in self.of("engine")}
        return [
            {"layers": layers, "as_installed": as_installed}
            for layers, as_installed in sorted(found, reverse=True)
        ]

    def best(
        self, shape: str, dtype: str, tokens: int, mode: str | None = None
    ) -> Best | None:
        """Return the fastest sparse kernel at a size; None if it or dense is untimed.

        :param mode: by default, the one in which a server runs this many tokens
        """
        mode = mode or ("eager" if tokens >= MANY else "graph")
        dense = self.dense(shape, dtype, tokens, mode)
        found = [
            (us, kernel)
            for kernel in SPARSE
            if (us := self.times.get((shape, dtype, tokens, kernel, mode)))
        ]
        if not found or dense is None:
            return None
        us, kernel = min(found)
        return Best(kernel, us, dense)

    def sizes(self) -> list[tuple[str, str, int]]:
        """Return shape, type and tokens of all that was timed, in the tables' order."""
        found = {(shape, dtype, tokens) for shape, dtype, tokens, *_ in self.times}
        return sorted(
            found, key=lambda s: (DTYPES.index(s[1]), SHAPES.index(s[0]), s[2])
        )

    def failures(self) -> list[Row]:
        """Return the rows of cases that failed and did not succeed later."""
        found = []
        for index, row in enumerate(self.rows):
            if "failed" not in row:
                continue
            case = record.case(row, "seconds")
            later = self.rows[index + 1 :]
            fixed = case and any(
                {"step": row["step"], **case}.items() <= other.items()
                and "failed" not in other
                for other in later
            )
            if not fixed:
                found.append(row)
        return found


def by_gpu(rows: Iterable[Row], trials: bool = False) -> dict[str, list[Row]]:
    """Group rows by GPU; rows without one belong to the preceding GPU.

    :param trials: return the rows of trials on a CPU instead
    """
    if trials:
        return {"a trial, not results": [row for row in rows if row.get("trial")]}
    found: dict[str, list[Row]] = {}
    gpu = None
    for row in rows:
        if row.get("trial"):
            continue
        gpu = row.get("gpu") or gpu
        if gpu is not None:
            found.setdefault(gpu, []).append(row)
    return found
