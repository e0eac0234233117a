"""A log line and a journal entry per layer, and a summary at the end of a run."""

import resource
import sys
import time
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from llmc_attnmask.distributed import is_source
from llmc_attnmask.runlog.context import run_of
from llmc_attnmask.runlog.journal import Entry, entries, note
from llmc_attnmask.runlog.wording import duration


class LayerLog:
    """Times the work on one layer: created when it begins, ``done`` when it ends."""

    def __init__(self, model: nn.Module, modifier: Modifier, name: str):
        self.model, self.modifier, self.name = model, modifier, name
        self._start = time.perf_counter()

    def done(
        self,
        device: torch.device,
        errors: dict[str, list[float]],
        zeros: int,
        entries: int,
        **measurements: Any,
    ) -> None:
        """Add the layer to the journal and, in one process, log a line about it.

        :param device: where it was computed
        :param errors: what is measured -> its errors, from first to last
        :param zeros: pruned entries
        :param entries: all entries of the weights that were pruned or refined
        :param measurements: for the journal, JSON values
        """
        seconds = time.perf_counter() - self._start
        peak = peak_memory(device)
        note(
            self.model,
            type(self.modifier).__name__,
            self.name,
            errors=errors,
            zeros=zeros,
            entries=entries,
            seconds=round(seconds, 3),
            peak_bytes=peak,
            **measurements,
        )
        left = run_of(self.modifier).layer_done(self.modifier)
        if not is_source():
            return
        changes = (
            f"{what} error {' -> '.join(f'{error:.5f}' for error in values)}"
            for what, values in errors.items()
        )
        logger.log(
            "METRIC",
            f"{self.name}: {', '.join(changes)}, {zeros / max(1, entries):.1%} zeros, "
            f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB{'; ' if left else ''}{left}",
        )


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: torch's on a GPU, or this process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def summarize(model: nn.Module) -> None:
    """Log one line per modifier in the journal, and one on the files that are saved."""
    by_modifier: dict[str, list[Entry]] = {}
    for entry in entries(model):
        by_modifier.setdefault(entry.modifier, []).append(entry)
    if not by_modifier:
        return
    lines = [f"{name}: {_summary(noted)}" for name, noted in by_modifier.items()]
    lines.append(
        "saved with the model: report.html, report.json and a model card; "
        "`llmc-attnmask eval DIR --reference MODEL` measures perplexity"
    )
    logger.log("METRIC", "\n  ".join(["summary", *lines]))


def _summary(noted: list[Entry]) -> str:
    measurements = [entry.measurements for entry in noted]
    parts = [f"{len(noted)} layers"]
    measured = dict.fromkeys(what for f in measurements for what in f["errors"])
    for what in measured:
        of = {e.layer: v for e in noted if (v := e.measurements["errors"].get(what))}
        first, last = (sum(v[i] for v in of.values()) / len(of) for i in (0, -1))
        worst = max(of, key=lambda layer: of[layer][-1])
        before = f"{first:.5f} -> " if any(len(v) > 1 for v in of.values()) else ""
        parts.append(
            f"{what} error {before}{last:.5f} on average, at most "
            f"{of[worst][-1]:.5f} ({worst})"
        )
    zeros = sum(f["zeros"] for f in measurements)
    parts.append(f"{zeros / max(1, sum(f['entries'] for f in measurements)):.1%} zeros")
    parts.append(duration(sum(f["seconds"] for f in measurements)))
    return ", ".join(parts)
