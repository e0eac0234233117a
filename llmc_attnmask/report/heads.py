"""Attention matrices of chosen heads, dense and pruned and their difference."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc_attnmask.attention.pictures import unpacked
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
    stored = [
        (layer["layer"], picture)
        for layer in report["layers"]
        for picture in layer.get("pictures", [])
    ]
    stored.sort(key=lambda pair: -pair[1]["error"])
    return [_head(name, picture) for name, picture in stored]


def _head(name: str, picture: Mapping[str, Any]) -> Head:
    label = f"layer {view.short(name)}, head {picture['head']}"
    error = view.error(picture["error"])
    return Head(
        label=f"{label}: error {error}",
        says=f"Attention of {label} among the first {picture['tokens']} tokens of a "
        f"calibration sample, queries down and keys across. Relative error {error}; "
        f"the largest change of an entry is {picture['largest_difference']:.3f}.",
        tokens=picture["tokens"],
        largest=picture["largest_difference"],
        **{name: unpacked(picture[name]) for name in ("dense", "pruned", "difference")},
    )
