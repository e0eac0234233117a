"""The context of a step: its device, its deadline, and where its figures go."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from integration.gpu import record
from integration.gpu.record import FILE, Row, append, read, today

ENOUGH = 2.0  # seconds that must be left for one more case


class GpuLostError(RuntimeError):
    """After an illegal access, this process can no longer use the GPU."""


@dataclass
class Context:
    """One step of one call.

    A ``trial`` runs on a CPU, with small shapes, to find mistakes; its rows are not
    results.
    """

    step: str
    folder: Path
    device: str = "cuda"
    deadline: float = float("inf")  # of time.monotonic
    gpu: str | None = None
    done: set[str] = field(default_factory=set)  # cases that must not run again
    _left_out: list[dict[str, Any]] = field(default_factory=list)

    @property
    def trial(self) -> bool:
        return self.device == "cpu"

    def left(self) -> float:
        """Return the seconds until this step times out."""
        return self.deadline - time.monotonic()

    def record(self, **figures: Any) -> None:
        """Append a row, with the step, the date and the GPU."""
        row: Row = {"step": self.step, "date": today(), "gpu": self.gpu}
        if self.trial:
            row["trial"] = True
        append(self.folder, row | figures)

    def rows(self) -> list[Row]:
        """Return the rows that this and earlier steps recorded."""
        path = self.folder / FILE
        return read(path).rows if path.exists() else []

    def attempt(
        self, case: dict[str, Any], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Record the figures of a case, or why there are none, and continue.

        A case that was recorded before the step was resumed does not run.

        :param case: what identifies it, recorded with the figures
        :return: the figures; None if there are none
        :raises GpuLostError: if the failure took the GPU from this process
        """
        if json.dumps(case) in self.done:
            return None
        if self.left() < ENOUGH:
            self._left_out.append(case)
            return None
        try:
            figures = work()
        except Exception as error:  # whatever it is, try the next case
            self.fail(case, error)
            return None
        self.record(**case, **figures)
        return figures

    def fail(self, case: dict[str, Any], error: Exception) -> None:
        """Record why a case has no figures.

        :raises GpuLostError: if the failure took the GPU from this process
        """
        traceback.print_exception(error)
        self.record(**case, failed=short(error))
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").item()
        except RuntimeError as error:
            raise GpuLostError(short(error)) from error
        torch.cuda.empty_cache()  # after an out-of-memory error

    def lacks(self, kernel: str, dtype: str, why: str) -> None:
        """Record, once, why a kernel has no figures."""
        row = {"kernel": kernel, "dtype": dtype, "missing": why}
        own = (record.case(row) for row in self.rows() if row["step"] == self.step)
        if row not in own:
            self.record(**row)

    def failed(self, **case: Any) -> bool:
        """Return whether this step has recorded a failure of exactly this case."""
        return any(
            "failed" in row and record.case(row) == case
            for row in self.rows()
            if row["step"] == self.step
        )

    def finish(self) -> None:
        """Record how many cases were skipped for lack of time."""
        if self._left_out:
            self.record(
                failed="no time left",
                left_out=len(self._left_out),
                first=self._left_out[0],
            )


def known(rows: list[Row], step: str) -> set[str]:
    """Return the cases of a step that have a row, in the form of ``Context.done``.

    A row starts with what identifies its case, followed by figures, so every prefix of
    a row may be a case.
    """
    found = set()
    for row in rows:
        if row["step"] != step:
            continue
        case: dict[str, Any] = {}
        for key, value in record.case(row).items():
            case[key] = value
            found.add(json.dumps(case))
    return found


def short(error: BaseException) -> str:
    """Return the type and message on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
