"""Derive from a report the numbers that the page and the model card show."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

METHODS = {
    "magnitude": "Magnitude",
    "Wanda": "Wanda",
    "SparseGPT": "SparseGPT",
    "ours": "This run",
}
_PLACE = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.(.*))?$")

Report = Mapping[str, Any]


def place(name: str) -> tuple[int, str] | None:
    """Return the number of the decoder layer and the name within it.

    All experts share one name.
    """
    match = _PLACE.search(name)
    if match is None:
        return None
    return int(match[1]), re.sub(r"experts\.\d+\.", "experts.", match[2] or "")


def short(name: str) -> str:
    """Return a layer's number, or its name if it has none."""
    found = place(name)
    return name if found is None else str(found[0])


def attention_layers(report: Report) -> list[Mapping[str, Any]]:
    """Return the layers whose attention error was compared with the baselines'."""
    return [layer for layer in report["layers"] if layer.get("compared")]


def methods(report: Report) -> list[str]:
    """Return those of ``METHODS`` that were measured on all attention layers."""
    layers = attention_layers(report)
    return [m for m in METHODS if layers and all(m in x["compared"] for x in layers)]


def mean_error(report: Report, method: str, kind: str = "matrix") -> float:
    """Return one method's relative attention error, averaged over layers."""
    layers = attention_layers(report)
    return sum(layer["compared"][method][kind] for layer in layers) / len(layers)


def decoder_zeros(report: Report) -> float | None:
    """Return the share of zeros in the decoder Linears whose sparsity is known."""
    known = [
        layer
        for layer in report["checkpoint"]
        if layer["sparsity"] is not None and place(layer["name"])
    ]
    entries = sum(_entries(layer["shape"]) for layer in known)
    if not entries:
        return None
    return (
        sum(layer["sparsity"] * _entries(layer["shape"]) for layer in known) / entries
    )


def token_bytes(report: Report) -> tuple[int, int]:
    """Return the bytes that one token reads with dense and with sparse kernels."""
    return (
        sum(layer["dense"] for layer in report["reading"]),
        sum(layer["sparse"] for layer in report["reading"]),
    )


def masks(report: Report) -> tuple[int, int, int]:
    """Count masked layers, pruned entries, and those that are no longer zero."""
    found = report["masks"]
    return (
        len(found),
        sum(mask["pruned"] for mask in found),
        sum(mask["filled"] for mask in found),
    )


def perplexities(report: Report) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the evaluations of the reference and this checkpoint, if both exist."""
    evaluations: Sequence[Mapping[str, Any]] = report["evaluation"]
    return (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else None


def answers(report: Report) -> Mapping[str, Any] | None:
    """Return the comparison with the reference on its own answers, if there is one."""
    evaluations: Sequence[Mapping[str, Any]] = report["evaluation"]
    # reports of earlier versions have no such entry
    return evaluations[-1].get("answers") if evaluations else None


def tasks(report: Report) -> list[tuple[str, str, float, float | None, float | None]]:
    """List task, metric, this model's value, the reference's, recovery in percent."""
    results: Sequence[Mapping[str, Any]] = report["tasks"]
    if not results:
        return []
    last = results[-1]["model"]
    reference = {
        (result["task"], result["metric"]): result["value"]
        for result in results
        if result["model"] != last
    }
    return [
        (
            result["task"],
            result["metric"],
            result["value"],
            reference.get((result["task"], result["metric"])),
            result["recovery"],
        )
        for result in results
        if result["model"] == last
    ]


def size(count: float) -> str:
    """Write a number of bytes in a readable unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def error(value: float) -> str:
    """Write a relative error with five decimals, or three digits if it is tiny."""
    return f"{value:.3g}" if value < 1e-4 else f"{value:.5f}"


def _entries(shape: Sequence[int]) -> int:
    rows, columns = shape
    return rows * columns
