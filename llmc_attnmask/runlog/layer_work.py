"""One layer's part in a modifier's pass, computed or read from an earlier run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from llmc_attnmask.runlog import journal
from llmc_attnmask.runlog.context import progress_of, run_of


@runtime_checkable
class Resumable(Protocol):
    """A modifier that does its work within ``layer_work``, layer by layer."""

    @property
    def done(self) -> dict[str, int]:
        """Layer -> how many of its modules have changed."""


@dataclass
class LayerWork:
    """What was done to one layer."""

    restored: bool = False  # read from disk, so that nothing remains to be done
    changed: list[nn.Module] = field(default_factory=list)


def restorable(modifier: Modifier, layer: str) -> bool:
    """Return whether ``layer_work`` will read a layer instead of having it computed."""
    progress = progress_of(modifier)
    return progress is not None and progress.has(modifier, layer)


@contextmanager
def layer_work(
    model: nn.Module, modifier: Resumable, layer: str
) -> Iterator[LayerWork]:
    """Work on one layer; in a recorded run, save the result or read an earlier one.

    Within, do the work unless it is ``restored``, and name the modules ``changed``.
    """
    owner = cast(Modifier, modifier)
    progress = progress_of(owner)
    work = LayerWork()
    if progress is not None and progress.has(owner, layer):
        work.restored = True
        work.changed = progress.restore(model, owner, layer)
        run_of(owner).layer_restored(owner)
        logger.info(f"{type(modifier).__name__}: {layer} was finished; read from disk")
    before = len(journal.entries(model))
    yield work
    if progress is not None and not work.restored:
        new = journal.entries(model)[before:]
        progress.save(model, owner, layer, work.changed, new)
    modifier.done[layer] = len(work.changed)
