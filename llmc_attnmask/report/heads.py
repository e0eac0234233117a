"""Attention maps of chosen heads: dense, pruned and their difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc_attnmask.attention.attention_maps import inflated
from llmc_attnmask.report import view


@dataclass(frozen=True)
class Head:
    """Three maps side by side, which the page's script draws."""

    label: str
    says: str
    tokens: int
    largest: float  # largest entry of the difference
    dense: str  # uint8 [tokens, tokens] in base64, as ``AttentionMap.encode`` scales it
    pruned: str
    difference: str


def heads(report: Mapping[str, Any]) -> list[Head]:
    """Return every head with stored attention maps, in order of decreasing error."""
    found = [
        (layer["layer"], attention_map)
        for layer in report["layers"]
        for attention_map in layer.get("pictures", [])
    ]
    found.sort(key=lambda pair: -pair[1]["error"])
    return [_head(name, attention_map) for name, attention_map in found]


def _head(name: str, stored: Mapping[str, Any]) -> Head:
    label = f"layer {view.short(name)}, head {stored['head']}"
    error = view.error(stored["error"])
    return Head(
        label=f"{label}: error {error}",
        says=f"Attention of {label} over the first {stored['tokens']} tokens of a "
        "calibration sample, with queries from top to bottom and keys from left to "
        f"right. The relative error is {error}, and the largest change of an entry is "
        f"{stored['largest_difference']:.3f}.",
        tokens=stored["tokens"],
        largest=stored["largest_difference"],
        **{name: inflated(stored[name]) for name in ("dense", "pruned", "difference")},
    )
