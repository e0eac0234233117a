"""What a run did, layer by layer: modifiers write it, the report reads it."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

_ATTRIBUTE = "_llmc_attnmask_journal"


@dataclass(frozen=True)
class Entry:
    """What one modifier did to one layer."""

    modifier: str  # class name
    layer: str  # name of the module
    figures: dict[str, Any] = field(default_factory=dict)  # JSON values only


def note(model: nn.Module, modifier: str, layer: str, **figures: Any) -> None:
    """Add an entry to the journal of a model, which goes with it in memory."""
    entries(model).append(Entry(modifier, layer, figures))


def entries(model: nn.Module) -> list[Entry]:
    """The journal of a model, oldest entry first; to be read, or added to."""
    if not hasattr(model, _ATTRIBUTE):
        setattr(model, _ATTRIBUTE, [])
    return getattr(model, _ATTRIBUTE)
