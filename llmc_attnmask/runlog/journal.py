"""The journal of a run, layer by layer: modifiers write it, the report reads it.

It is kept with the model in memory, as plain attributes, so a copy of the model has its
own journal.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

_ENTRIES = "_llmc_attnmask_journal"
_METADATA = "_llmc_attnmask_metadata"


@dataclass(frozen=True)
class Entry:
    """What one modifier did to one layer."""

    modifier: str  # class name
    layer: str  # name of the module
    measurements: dict[str, Any] = field(default_factory=dict)  # JSON values only


def note(model: nn.Module, modifier: str, layer: str, **measurements: Any) -> None:
    """Add an entry to the journal of a model."""
    entries(model).append(Entry(modifier, layer, measurements))


def entries(model: nn.Module) -> list[Entry]:
    """Return the journal of a model, oldest entry first, to read or to add to."""
    if not hasattr(model, _ENTRIES):
        setattr(model, _ENTRIES, [])
    return getattr(model, _ENTRIES)


def run_metadata(model: nn.Module) -> dict[str, Any]:
    """Return the metadata of the run as a whole, to read or to add to.

    ``modifiers``: name and fields of each; ``warnings``: their texts; ``options``: the
    arguments the run was started with. JSON values only.
    """
    if not hasattr(model, _METADATA):
        setattr(model, _METADATA, {})
    return getattr(model, _METADATA)
