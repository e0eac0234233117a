"""The few numbers that readers look for first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmc_attnmask.report import view

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """A number, its name, and what to compare it with."""

    name: str
    value: str
    note: str


def tiles(report: Report) -> list[Tile]:
    """Return the tiles that the report has numbers for."""
    found = [
        _attention(report),
        _perplexity(report),
        _answers(report),
        _zeros(report),
        _disk(report),
        _token_bytes(report),
        _masks(report),
        _time(report),
    ]
    return [tile for tile in found if tile is not None]


def _attention(report: Report) -> Tile | None:
    methods = view.methods(report)
    if "ours" not in methods:
        return None
    means = {
        view.METHODS[method]: view.mean_error(report, method) for method in methods
    }
    ours = means.pop(view.METHODS["ours"])
    note = f"mean of {len(view.attention_layers(report))} layers"
    known = {name: error for name, error in means.items() if error}
    if known and ours:
        best = min(known, key=lambda name: known[name])
        ratio = ours / known[best]
        note = f"{ratio:.2f} x {best}'s {view.error(known[best])}"
    return Tile("Attention error", view.error(ours), note)


def _perplexity(report: Report) -> Tile | None:
    pair = view.perplexities(report)
    if pair is None:
        return None
    dense, pruned = (evaluation["perplexity"] for evaluation in pair)
    return Tile(
        "Perplexity",
        f"{pruned:.3f}",
        f"{pruned - dense:+.3f} compared with the reference",
    )


def _answers(report: Report) -> Tile | None:
    found = view.answers(report)
    if found is None:
        return None
    return Tile(
        "Agreement on answers",
        f"{found['agreement']:.1%}",
        f"KL {found['kl']:.4f} nats per token, {found['tokens']:,} tokens",
    )


def _zeros(report: Report) -> Tile | None:
    zeros = view.decoder_zeros(report)
    if zeros is None:
        return None
    sparse = sum(bool(layer["two_of_four"]) for layer in report["checkpoint"])
    return Tile("Zeros in the decoder", f"{zeros:.1%}", f"{sparse} layers are 2:4")


def _disk(report: Report) -> Tile:
    size = sum(layer["bytes"] for layer in report["checkpoint"])
    packed = sum("24" in layer["format"] for layer in report["checkpoint"])
    note = f"{packed} layers packed" if packed else "stored dense, with zeros in place"
    return Tile("Weights on disk", view.size(size), note)


def _token_bytes(report: Report) -> Tile | None:
    dense, sparse = view.token_bytes(report)
    if not dense:
        return None
    note = "fewer bytes per token" if sparse < dense else "no layer for sparse kernels"
    return Tile("Decoding, predicted", f"{dense / sparse:.2f} x", note)


def _masks(report: Report) -> Tile | None:
    layers, pruned, filled = view.masks(report)
    if not layers:
        return None
    kept = "all still zero" if not filled else f"{filled:,} no longer zero"
    return Tile("Pruned entries", f"{pruned:,}", f"{kept}, {layers} layers")


def _time(report: Report) -> Tile | None:
    seconds = sum(layer["seconds"] for layer in report["layers"])
    if not seconds:
        return None
    peak = max(layer["peak_bytes"] for layer in report["layers"])
    value = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    return Tile(
        "Time", value, f"in this package's modifiers, peak memory {view.size(peak)}"
    )
