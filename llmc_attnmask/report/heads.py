"""Attention matrices of chosen heads, dense and pruned and their difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc_attnmask.attention.attention_maps import inflated
from llmc_attnmask.report import view


@dataclass(frozen=True)
class Head:
    """Three matrices side by side, for the page's script to draw."""

    label: str
    says: str
    tokens: int
    largest: float  # largest entry of the difference
    dense: str  # uint8 [tokens, tokens] in base64, as ``pictures`` scales it
    pruned: str
    difference: str


def heads(report: Mapping[str, Any]) -> list[Head]:
    """Every head that a run has kept matrices of, the one that lost most first."""
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
        says=f"Attention of {label} among the first {stored['tokens']} tokens of a "
        f"calibration sample, queries down and keys across. Relative error {error}; "
        f"the largest change of an entry is {stored['largest_difference']:.3f}.",
        tokens=stored["tokens"],
        largest=stored["largest_difference"],
        **{name: inflated(stored[name]) for name in ("dense", "pruned", "difference")},
    )
